"""The tables of experiments."""
import dataclasses
import importlib

import pytest
from hybridvae.experiments import TABLES, entries_of


@pytest.mark.parametrize("stage", TABLES)
def test_a_table_gives_the_entries_of_its_stages_function(stage):
    before = {(e.dataset, e.experiment, e.seed): e for e in importlib.import_module(f"hybridvae.{stage}").experiments()}
    after = {(e.dataset, e.experiment, e.seed): e for e in entries_of(stage=stage)}
    assert after == {key: dataclasses.replace(e, priority=0) for key, e in before.items()}
