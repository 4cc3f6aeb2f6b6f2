"""Container engines that speak a protocol of their own: Docker's graph driver plugin, containerd's snapshotter.

Both translate onto a `Store`; neither keeps state of its own, so that a restart forgets nothing.
"""
