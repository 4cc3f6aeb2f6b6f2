"""The benchmark behind `scripts/bench`: needs only the standard library, root, and a real disk filesystem.

Threading: none; one sample at a time. What is measured runs in a process of its own (`loops`), so that the
harness's memory, garbage collector and imports weigh on no peer.
"""
