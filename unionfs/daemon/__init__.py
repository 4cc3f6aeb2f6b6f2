"""`unionfs daemon`: one store behind a REST API, for those whom its sockets let in."""
