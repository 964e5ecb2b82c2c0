"""python -m tdro_hpc.info: what it says of this machine, and that it finds a loss that is wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tdro_hpc import info
from tdro_hpc.losses import host, plain
from tdro_hpc.losses.library import PATH, Library, load
from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import needs_library

REASON = "libtdro_kernels.so is not built. Type `make build` in some folder."


def test_info_names_torch_the_library_and_optional_packages(capsys: pytest.CaptureFixture[str]):
    assert info.main([]) == 0
    said = capsys.readouterr()
    assert f"torch          {torch.__version__}, " in said.out and "loss on cpu: " in said.out and said.err == ""
    for name in ("GPU", "compiled loss", "flash-attn", "apex", "deepspeed", "faiss"):
        assert f"\n{name}  " in said.out
    assert said.out.count("right: losses off by ") == 3 * (1 + torch.cuda.is_available())


@needs_library
def test_the_library_in_use_and_its_code_are_named(capsys: pytest.CaptureFixture[str]):
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert str(PATH) in said and "loss on cpu: compiled\n" in said
    assert f"on this CPU by its {torch.ops.tdro_hpc.infonce_cpu_path()} code" in said
    assert ("built with CUDA" if load().cuda else "built for CPUs only") in said


def test_without_the_library_the_loss_in_torch_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(info, "load", lambda: Library(None, reason=REASON))
    monkeypatch.setattr(info.fused, "obstacle", lambda dtype, device: REASON)
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert f"compiled loss  none: {REASON}" in said and f"loss on cpu: in plain torch, because {REASON}" in said


@pytest.mark.parametrize("wrong", ["losses", "gradients", "nan"])
@pytest.mark.parametrize("function", ["by_rows", "by_sum", "by_both_sides"])
def test_a_loss_that_is_wrong_ends_with_1(
    wrong: str, function: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = getattr(info, function)

    def broken(*arguments: Any) -> list[torch.Tensor]:
        found = right(*arguments)
        place = 0 if wrong == "losses" else 2
        found[place] = found[place] * (float("nan") if wrong == "nan" else 1.05)
        return found

    monkeypatch.setattr(info, function, broken)
    assert info.main([]) == 1
    said = capsys.readouterr()
    assert said.out.count(" WRONG: losses off by") == 3 * (1 + torch.cuda.is_available())
    assert "The loss on cpu is WRONG: do not train with it." in said.err


@needs_library
@pytest.mark.parametrize("side", [0, 1])
def test_a_gradient_that_is_wrong_in_its_last_part_ends_with_1(
    side: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Half precision is summed in parts where there is no room for the whole sums."""
    right, name = host._of_part, ("queries", "documents")[side]
    whole = getattr(info.random_problem("cpu", torch.float32), name)

    def broken(problem: host.Problem, *rest: Any) -> torch.Tensor:
        part, gradient = getattr(problem, name), right(problem, *rest)
        is_last = len(part) < len(whole) and torch.equal(part[-1], whole[-1].to(part.dtype))
        return gradient * 1.05 if rest[-1] == side and is_last else gradient

    monkeypatch.setattr(host, "_of_part", broken)
    assert info.main([]) == 1
    said = capsys.readouterr().out
    assert "float32   right" in said and "bfloat16  WRONG" in said and "float16   WRONG" in said


@needs_library
def test_a_call_without_options_that_is_wrong_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = plain.of_sides
    monkeypatch.setattr(plain, "of_sides", lambda *given: [1.05 * gradient for gradient in right(*given)])
    assert info.main([]) == 1
    said = capsys.readouterr().out
    assert "float32   WRONG" in said and "bfloat16  right" in said and "float16   right" in said


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_dense_loss_is_that_of_the_slow_reference(symmetric: bool):
    problem = info.random_problem("cpu", torch.float32)
    sides = [side.double().requires_grad_() for side in (problem.queries, problem.documents)]
    names = "query_group", "document_group", "document_ids"
    masks = {name: getattr(problem, name) for name in names}
    losses = slow_infonce(*sides, problem.positives, temperature=info.TEMPERATURE, symmetric=symmetric, **masks)
    gradients = torch.autograd.grad((problem.row_weights * losses).sum(), sides)
    dense = info.dense_loss(problem, symmetric=symmetric)
    for found, wanted in zip(dense, (losses.detach(), *gradients), strict=True):
        torch.testing.assert_close(found, wanted)
    assert (losses[-1] == 0) != symmetric, "a row without negatives"
    assert (problem.document_ids == problem.positives[0]).sum() == 2, "a row with a double of its positive"


def test_a_library_that_is_older_than_its_sources_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/ops.cpp").touch()
    monkeypatch.setattr(info.tdro_hpc, "__file__", str(tmp_path / "tdro_hpc/__init__.py"))
    library = tmp_path / "lib.so"
    library.touch()
    assert info._outdated(library) == ""
    os.utime(library, (time.time() - 60,) * 2)
    assert info._outdated(library) == ", older than ops.cpp: type `make build`"


def test_a_package_that_only_has_the_name_of_apex_is_told_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    (tmp_path / "apex-0.9.10.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    (tmp_path / "apex-0.9.10.dist-info/top_level.txt").write_text("apex\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert dict(info.package_lines())["apex"] == "apex 0.9.10, which is not NVIDIA's apex"
    (tmp_path / "apex/optimizers").mkdir()
    assert dict(info.package_lines())["apex"] == "apex 0.9.10"


def test_words_are_a_mistake():
    done = subprocess.run([sys.executable, "-m", "tdro_hpc.info", "now"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "tdro_hpc.info takes no words, and was given now.\n")
