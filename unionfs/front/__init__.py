"""Command lines and the control socket. Nobody imports front."""
