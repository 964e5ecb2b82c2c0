"""The front door without jobs: what a line means, what is wrong with it, and what it costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdro_hpc.config.load import ConfigError
from tdro_hpc.submit import main, parse_call

ROOT = Path(__file__).parents[1]


def problems_of(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_call(list(words))
    return caught.value.problems


def submit(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main([*words, f"runs_dir={tmp_path}"])
    said = capsys.readouterr()
    return code, said.out, said.err


def plan_file(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    stages = [
        {"name": "s0", "kind": "s0", "needs": [], "action": "run"},
        {"name": "s1", "kind": "s1", "needs": ["s0"], "action": "run"},
        {"name": "eval", "kind": "eval", "needs": ["s0"], "action": ""},
    ]
    (run_dir / "plan.json").write_text(json.dumps({"line": "", "time": 0, "stages": stages}))


def rows_in(folder: Path, *tasks: str) -> Path:
    folder.mkdir(parents=True)
    for task in tasks:
        (folder / f"{task}.jsonl").write_text("{}\n")  # a plan opens no rows
    return folder


def collection_in(folder: Path) -> Path:
    (folder / "one" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / "one" / name).write_text("")
    return folder


def test_options_and_keys_are_told_apart():
    call = parse_call(["stage=s1", "s1.eta=0.05", "dry_run=true", "name=x"])
    assert (call.word, call.options) == ("run", {"stage": "s1", "dry_run": "true"})
    assert call.config.s1.eta == 0.05 and call.run_dir == Path("runs/x")
    assert call.is_on("dry_run") and not call.is_on("strict")


def test_word_after_submit():
    assert parse_call(["logs", "stage=s1", "follow=true"]).word == "logs"
    assert parse_call(["status"]).names_run is False
    assert parse_call(["status", "name=x"]).names_run is True


def test_line_to_continue_leaves_force_out():
    assert parse_call(["stage=all", "force=s0", "data.dir=a b"]).line == (
        "python -m tdro_hpc.submit stage=all 'data.dir=a b'"
    )
    assert parse_call(["force=s0"]).line == "python -m tdro_hpc.submit stage=s0"


def test_nothing_after_submit_prints_three_lines_to_try(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.count("    python -m tdro_hpc.submit") == 3 and len(said.splitlines()) < 20


def test_lines_of_the_help_parse():
    assert main(["help"]) == 0
    for line in (main.__globals__["__doc__"]).splitlines():
        if line.strip().startswith("python -m"):
            words = line.split("     ")[0].split("  ")
            command = " ".join(words).split()
            known = [word for word in command[3:] if "=" in word or word == "status"]
            parse_call([word for word in known if not word.startswith("config=")])


def test_all_mistakes_of_a_call_come_together_without_traceback(tmp_path, capsys):
    code, out, err = submit(
        tmp_path, capsys, "stge=s1", "s0.stepz=3", "s1.eta=-1", "dry_run=maybe", "force=", "strict=true", "strict=true"
    )
    assert code == 2 and out == "" and "Traceback" not in err
    for part in (
        "Did you mean stage?",
        "s0.steps",
        "s1.eta",
        "dry_run is 'maybe'; it must be true or false",
        "force= is empty",
        "strict is given twice",
    ):
        assert part in err
    assert not list(tmp_path.iterdir())


def test_unknown_stage_names_the_nearest():
    assert problems_of("stage=s2-cur") == [
        "Unknown stage s2-cur. Did you mean s2-curr? There are all, s0, s1, s2, eval, export, s2-curr."
    ]


def test_option_of_another_word_says_where_it_belongs():
    assert problems_of("stage=s1", "follow=true") == [
        "follow= means nothing here; it belongs to: python -m tdro_hpc.submit logs. Leave it out."
    ]
    assert "it belongs to: python -m tdro_hpc.submit." in problems_of("status", "dry_run=true")[0]


def test_misplaced_and_unknown_words():
    assert "status has to be the first word" in problems_of("name=x", "status")[0]
    assert problems_of("stats") == ["Unknown word stats. Type one of status, logs, cancel, report, or key=value."]


def test_key_that_stands_twice_on_the_line_is_a_mistake():
    assert problems_of("s0.steps=200", "s1.eta=0.1", "s0.steps=300") == [
        "s0.steps is given twice: s0.steps=200 and s0.steps=300. Leave one out."
    ]


def test_stage_prepare_without_built_data_says_what_to_type():
    assert problems_of("stage=prepare", "data.dir=rows") == [
        "Stage prepare exists with data=embedded only: other data are there already. Type data=embedded."
    ]


@pytest.mark.parametrize("words", [["stage=all", "--help"], ["status", "-h"], ["help"]])
def test_help_is_given_wherever_it_is_asked_for(words, capsys):
    assert main(words) == 0 and "Exit codes" in capsys.readouterr().out


def test_folder_on_the_line_takes_the_place_of_the_built_data(tmp_path, capsys):
    rows, tests = rows_in(tmp_path / "rows", "a", "b", "c", "d", "e"), collection_in(tmp_path / "tests")
    words = ("stage=all", "config=demo", f"data.dir={rows}", f"eval.dir={tests}", "dry_run=true")
    code, out, err = submit(tmp_path / "runs", capsys, *words)
    assert code == 0 and err == "" and "prepare" not in out and "s2-top70" in out


def test_inputs_that_are_not_there_stop_the_plan_together(tmp_path, capsys):
    rows = rows_in(tmp_path / "rows", "news", "mails", "forum")
    words = ["stage=all", f"data.dir={rows}", "s0.weights=mine.json", "eval.models=base,./gone"]
    code, out, err = submit(tmp_path / "runs", capsys, *words)
    assert code == 2 and out == "" and "Traceback" not in err
    for part in (
        "s1.top_percents=40,50,60,70,80,90",
        "s0.weights names mine.json",
        "eval.dir is empty",
        "eval.models names ./gone, which is no folder",
    ):
        assert part in err
    assert not (tmp_path / "runs").exists()


def test_check_reports_missing_inputs_as_the_plan_does(tmp_path, capsys):
    code, _, err = submit(tmp_path / "runs", capsys, "stage=s0", "data.dir=gone", "check=true")
    assert code == 2 and "data.dir is gone, which is not a folder" in err and not (tmp_path / "runs").exists()


def test_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = submit(tmp_path / "file", capsys, "stage=s0", "config=demo")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{tmp_path}/file" in err and "Not a directory. Set runs_dir=<folder you may write>." in err


def test_two_weight_choices_of_one_name_are_refused():
    assert "both be made in the folder s2-curr" in problems_of("s2.weights=curr,mine/curr.json")[0]


def test_dry_run_shows_the_chain_and_each_figure_once(tmp_path, capsys):
    code, out, err = submit(tmp_path, capsys, "stage=all", "config=demo", "dry_run=true", "cluster.ranks_per_node=2")
    assert code == 0 and err == ""
    for name in ("s0", "s1", "s2-curr", "eval"):
        assert f"-m tdro_hpc.run {tmp_path}/demo/{name}" in out
    figures = [line[8:] for line in out.splitlines() if " = " in line]
    assert len(figures) == len(set(figures)) > 5
    assert "ranks 2 = 1 node x 2 ranks_per_node" in figures
    assert not list(tmp_path.iterdir())


def test_strict_without_drift_is_no_error(tmp_path, capsys):
    assert submit(tmp_path, capsys, "stage=s0", "config=demo", "strict=true", "dry_run=true")[0] == 0


def test_status_tells_what_waits_for_what(tmp_path, capsys):
    plan_file(tmp_path / "a")
    code, out, _ = submit(tmp_path, capsys, "status", "name=a")
    lines = out.splitlines()
    assert code == 0 and lines[1].split() == ["stage", "state", "job", "attempt", "step", "loss", "eta", "reason"]
    assert lines[2].endswith("not started yet") and lines[3].endswith("waiting for s0")
    assert len(lines) == 4  # eval was not asked for


def test_status_without_a_name_shows_every_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2 and "There is no run in runs/ yet" in capsys.readouterr().err
    for name in ("a", "b"):
        plan_file(tmp_path / "runs" / name)
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "run runs/a" in out and "run runs/b" in out
    assert main(["status", f"runs_dir={tmp_path}/runs"]) == 0
    out = capsys.readouterr().out
    assert f"run {tmp_path}/runs/a" in out and f"run {tmp_path}/runs/b" in out
    assert main(["cancel"]) == 2
    assert "Which run is meant? There are a, b." in capsys.readouterr().err


def test_words_about_a_run_that_is_not_there(tmp_path, capsys):
    plan_file(tmp_path / "a")
    for word in ("status", "logs", "cancel", "report"):
        code, _, err = submit(tmp_path, capsys, word, "name=b")
        assert code == 2 and f"There is no run {tmp_path}/b. Runs in {tmp_path}: a." in err
    code, _, err = submit(tmp_path, capsys, "logs", "name=a")
    assert code == 2 and "has no log of any stage yet" in err


def test_submit_costs_under_a_second_and_imports_nothing_heavy(tmp_path):
    rows, tests = rows_in(tmp_path / "rows", "a", "b", "c", "d", "e"), collection_in(tmp_path / "tests")
    heavy = ("torch", "transformers", "submitit", "matplotlib")
    code = (
        "import sys\nfrom tdro_hpc.submit import main\n"
        f"main(['stage=all', 'config=demo', 'data.dir={rows}', 'eval.dir={tests}', 'dry_run=true', "
        f"'runs_dir={tmp_path}/runs'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stderr.strip() == "[]"
    # Time of the processor, not of the clock: other tests may be at work beside this one.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_sweep_makes_a_plan_for_each_value(tmp_path, capsys):
    code, out, err = submit(tmp_path, capsys, "stage=s0", "config=demo", "s0.steps=10,20", "dry_run=true")
    assert code == 0 and err == ""
    for steps in ("10", "20"):
        assert f"---- s0.steps={steps}" in out and f"-m tdro_hpc.run {tmp_path}/demo-s0.steps{steps}/s0" in out
    assert not list(tmp_path.iterdir())


def test_line_of_one_run_of_a_sweep_is_its_own():
    first, second = parse_call(["stage=s1", "name=a", "s1.eta=0.01,0.02", "force=s1"]).runs
    assert second.line == "python -m tdro_hpc.submit stage=s1 s1.eta=0.02 name=a-eta0.02"
    again = parse_call(second.line.split()[3:])
    assert again.config == second.config and again.runs == (again,)
    assert first.options == second.options == {"stage": "s1", "force": "s1"}


def test_mistake_in_one_value_of_a_sweep_names_the_value():
    assert problems_of("s1.eta=0.01,-2")[0].startswith("s1.eta on the command line is -2")
    assert "s1.eta=0.01,fast" not in problems_of("s1.eta=0.01,fast")[0]
    assert "'fast'" in problems_of("s1.eta=0.01,fast")[0]
    assert "empty value" in problems_of("s1.eta=0.01,")[0]


def test_lists_in_a_text_are_no_sweep():
    call = parse_call(["s2.weights=curr,mean", "s1.top_percents=20,50"])
    assert call.sweep == () and call.config.s2.weights == "curr,mean"


def test_local_sweep_runs_one_after_the_other_and_stops_at_the_first_failure(tmp_path, capsys, monkeypatch):
    rows = rows_in(tmp_path / "rows", "a")
    run, codes = [], iter([0, 1, 0])
    monkeypatch.setattr("tdro_hpc.submit.run_chain", lambda chain: run.append(chain) or next(codes))
    words = ("stage=s0", "name=a", f"data.dir={rows}", "s0.steps=1000,2000,3000")
    code, out, _ = submit(tmp_path / "runs", capsys, *words)
    assert code == 1 and [chain.config.s0.steps for chain in run] == [1000, 2000]
    assert [chain.run_dir.name for chain in run] == ["a-s0.steps1000", "a-s0.steps2000"]
    saved = (tmp_path / "runs" / "a-s0.steps2000" / "config.yaml").read_text()
    assert "steps: 2000" in saved and "name: a-s0.steps2000" in saved
    assert "name=a-s0.steps3000" in out.splitlines()[-1]  # what to type for the rest


def test_words_about_the_runs_of_a_sweep(tmp_path, capsys):
    for eta in ("0.01", "0.02"):
        plan_file(tmp_path / f"a-eta{eta}")
    code, out, _ = submit(tmp_path, capsys, "status", "name=a", "s1.eta=0.01,0.02")
    assert code == 0 and out.count("run ") == 2
    code, _, err = submit(tmp_path, capsys, "cancel", "name=a", "s1.eta=0.01,0.02")
    assert code == 2 and "Which run is meant? There are a-eta0.01, a-eta0.02." in err


def test_status_of_a_run_that_never_met_slurm_asks_nobody(tmp_path, capsys, monkeypatch):
    plan_file(tmp_path / "a")
    monkeypatch.setattr("tdro_hpc.launch.look.status.ask_queue", lambda: pytest.fail("squeue was asked"))
    assert submit(tmp_path, capsys, "status", "name=a")[0] == 0
    code, out, _ = submit(tmp_path, capsys, "status", "name=a", "watch=true")  # nothing is at work: one table
    assert code == 0 and out.count("not started yet") == 1
