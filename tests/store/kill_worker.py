"""Works on a store as hard as it can until it is killed; says on standard output what it has been promised.

Run as: python kill_worker.py ROOT DRIVER SEED LAYOUT. A line "done ID" is written after a commit returned, "going ID"
before a removal is asked for; whoever reads knows what must be there after the kill.
"""

from __future__ import annotations

import io
import os
import random
import sys
import tarfile
import threading

from unionfs.store.api import StoreError
from unionfs.store.images import Images
from unionfs.store.layers import LayerStore

THREADS = 4


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")  # one write: whole, or not at all


def content(id: str) -> bytes:
    return id.encode() * 3000


def archive(id: str) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in ((id, content(id)), ("shared", os.urandom(20_000))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


class Worker:
    def __init__(self, store: LayerStore, seed: str) -> None:
        self.store = store
        self.seed = seed
        self.lock = threading.Lock()
        self.committed = [layer.id for layer in store.layers() if layer.kind == "committed" and layer.id[0] == "k"]

    def turn(self, chance: random.Random, name: str) -> None:
        with self.lock:
            parent = chance.choice([*self.committed[-8:], "", ""])
        try:
            self.store.create(name, parent)
        except StoreError:
            return  # the parent was just removed
        self.store.apply(name, archive(f"k{name}"))
        if chance.random() < 0.3 and not self.store.backend.whole:
            with open(self.store.get(name) + "/by-mount", "w") as stream:
                stream.write(name)
            self.store.put(name)
        if chance.random() < 0.2:
            self.store.remove(name)
            return
        self.store.commit(name, f"k{name}")
        say(f"done k{name}")
        with self.lock:
            self.committed.append(f"k{name}")
            victim = chance.choice(self.committed) if chance.random() < 0.4 else ""
        if victim:
            say(f"going {victim}")
            try:
                self.store.remove(victim)
            except StoreError:
                return  # a parent, or another thread was quicker
            with self.lock:
                if victim in self.committed:
                    self.committed.remove(victim)

    def layers(self, number: int) -> None:
        chance = random.Random(f"{self.seed}-{number}")
        turn = 0
        while True:
            turn += 1
            self.turn(chance, f"{self.seed}-{number}-{turn}")

    def images(self, layout: str) -> None:
        images = Images(self.store)
        turn = 0
        while True:
            turn += 1
            name = f"i{self.seed}-{turn}:1"
            images.load(layout, name)
            say(f"done {name}")
            say(f"going {name}")
            images.remove(name)


def main() -> None:
    root, driver, seed, layout = sys.argv[1:5]
    store = LayerStore(root, driver, {"sync": "off"})  # a kill is not a power cut: what is written stays written
    worker = Worker(store, seed)
    say("ready")
    for number in range(THREADS):
        threading.Thread(target=worker.layers, args=(number,)).start()
    worker.images(layout)


if __name__ == "__main__":
    main()
