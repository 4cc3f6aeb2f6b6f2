"""The differential suite: the same operations on our mount, on the kernel's overlayfs and on a plain directory.

    operations.py    what a sequence may consist of, as hypothesis strategies
    executor.py      runs one sequence in one directory and writes down everything that could be seen
    layers.py        the fixed trees that sequences start from
    filesystems.py   the file systems under comparison, each served by a worker process
    compare.py       first difference between two records; the table of differences that are by design
    runner.py        batches, reproducers, the final look through the kernel's overlayfs
"""
