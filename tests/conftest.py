"""What several test files use: a full disk, a check of the user's error messages, and small models."""
import errno
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hybridvae.core import HybridVAEError


def randomised(model, scale=0.2, seed=0):
    "The model with every parameter drawn anew: layers that start at zero would hide what is wired to nowhere."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def double_precision(monkeypatch):
    "All numbers in float64, those that the package casts to float32 too: equalities can then be tight."
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def nothing_is_kept():
    "Images and reference statistics that runs keep in memory are those of one test."
    yield
    if "hybridvae.runs" in sys.modules:
        sys.modules["hybridvae.runs"]._forget()


@pytest.fixture
def float32(monkeypatch):
    "Networks run in float32 on every machine: what they make is compared with numbers computed so."
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "fp32")


def inception_stand_in(path):
    "Write random weights in the layout of Inception's published file; return the path."
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for p in network.parameters():
        if p.dim() == 4:
            torch.nn.init.kaiming_normal_(p)
    network.fc.weight.data.mul_(100)  # so that classes differ
    torch.save(network.state_dict(), path)
    return path


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def files_below(folder):
    "Everything below a folder, temporary files and folders too."
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


class complains:
    "The block must raise a `HybridVAEError` that is one sentence and says each of `words`."

    def __init__(self, *words):
        self.words = words

    def __enter__(self):
        self.raises = pytest.raises(HybridVAEError)
        self.info = self.raises.__enter__()
        return self

    def __exit__(self, kind, *exception):
        caught = self.raises.__exit__(kind, *exception)
        if not caught:
            return False  # another exception: let it be seen
        message = str(self.info.value)
        assert message.endswith(".") and "\n" not in message, message
        # one sentence: no full stop followed by a space and a capital, what others said in brackets left out
        assert not re.search(r"\.\s+[A-Z]", re.sub(r"\(.*\)", "", message)), message
        for word in self.words:
            assert str(word) in message, f"{word!r} is not in {message!r}"
        return caught


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
