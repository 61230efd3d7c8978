"""Threads whose first use of a device would be a product."""

from __future__ import annotations

import threading

import torch

from hippos.ops.first_product import prepare_products


def test_each_thread_uses_each_device_once(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: made.append((threading.get_ident(), device.index)))
    monkeypatch.setattr("hippos.ops.first_product._thread", threading.local())

    def use():
        for index in (0, 1, 0):
            prepare_products(torch.device("cuda", index))
        prepare_products(torch.device("cpu"))

    use()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [index for _, index in made] == [0, 1, 0, 1]
    assert len(set(made)) == 4
