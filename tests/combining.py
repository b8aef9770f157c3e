"""Tiny adapters to combine, and what each does to its weights."""

from __future__ import annotations

import json

import torch
from tiny import make_run, run_ranks

from decompft.adapters.inject import adapters
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.tools.combine import main


def train(folder, name, learning_rate=0.02, **adapter):
    """The run directory of an adapter that was trained for four steps over an nf4 base."""
    run = make_run(folder, name, adapter=adapter, train={"learning_rate": learning_rate})
    run_ranks(run)
    return str(run.path)


def quiet(*args):
    pass


def combined(out, *argv, capsys=None):
    """Runs the tool; returns its JSON."""
    capsys.readouterr()
    main([*argv, "--out", str(out), "--json"])
    return json.loads(capsys.readouterr().out)


def write_task(path, answer):
    text = "Is {}?\n\nAnswer format: a/b"
    rows = [{"instruction": text.format(i), "output": answer, "answer": answer} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_folder(run):
    return adapter_folder(str(run))


def dense_parts(run):
    """What an adapter does to each weight: (trained-on weight, change), in numpy float64."""
    loaded = load(run_folder(run), base=None, say=quiet)
    found = {}
    for name, layer in adapters(loaded.model.model):
        base = layer.base.dense(torch.float32)
        found[name] = base.double().numpy(), (layer.merged(base).double() - base.double()).numpy()
    return found


def changes(run):
    return {name: change for name, (_, change) in dense_parts(run).items()}
