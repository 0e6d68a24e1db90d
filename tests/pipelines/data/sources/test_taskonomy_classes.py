"""The two tasks of Taskonomy whose files are vectors: what another network made of the whole picture."""

import io
import pickle

import numpy as np
import pytest

from pipelines.data.sources.base import BadSampleError
from pipelines.data.sources.taskonomy.tasks import most_likely
from tests.pipelines.data.sources.taskonomy_files import label, more_arrays, only, path, save


def test_most_likely_class_of_logits_and_of_probabilities_is_equal(tmp_path):
    logits = more_arrays()["class_object"]
    likely = np.exp(logits - logits.max())
    for values in (logits, likely / likely.sum()):
        assert label(tmp_path, "class_object", values) == logits.argmax()
    save(tmp_path, more_arrays())
    np.save(path(tmp_path, "class_object"), logits[None])  # some copies have an axis for the batch
    assert only(tmp_path, tasks=["class_object"])["task.class_object"] == logits.argmax()


def npy(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.arange(364.0)), r"expected 365 numbers, got an array of shape \(364,\): .*class_places\.npy"),
        (npy(np.ones((2, 365))), r"expected 365 numbers, got an array of shape \(2, 365\)"),
        (npy(np.array(["a", "b"])), "expected 365 numbers: "),
        (npy(np.array([{}]), allow_pickle=True), "damaged .npy file .*allow_pickle"),
        (npy(np.arange(365.0))[:900], r"damaged \.npy file .*class_places\.npy"),
        (pickle.dumps([1.0] * 365), r"damaged \.npy file"),
        (b"", r"damaged \.npy file"),
        (npy(np.full(365, 1 / 365)), "no class is the most likely"),
        (npy(np.full(365, np.nan)), "no class is the most likely"),
        (npy(np.where(np.arange(365) == 3, np.inf, 0)), "no class is the most likely"),
    ],
)
def test_class_files_that_cannot_be_used(tmp_path, data, reason):
    save(tmp_path, more_arrays())
    path(tmp_path, "class_scene").write_bytes(data)
    with pytest.raises(BadSampleError, match=reason):
        only(tmp_path, tasks=["class_scene"])


def test_archive_is_not_a_class_file():
    file = io.BytesIO()
    np.savez(file, values=np.arange(365.0))
    with pytest.raises(BadSampleError, match=r"expected 365 numbers: x\.npy"):
        most_likely(file.getvalue(), "x.npy", 365)
