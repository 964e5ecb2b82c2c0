import pytest

from tdro_hpc.config.schema import TaskConfig
from tdro_hpc.data.taskfile import read_task_file


def test_keys_get_the_types_of_the_schema(tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "b-2.x:\n  symmetric: yes\n  language: no\n  rows: 12\n  instructions: [One, 'Two: three']\na: {}\nc:\n"
    )
    tasks = read_task_file(tmp_path / "tasks.yaml")
    assert list(tasks) == ["b-2.x", "a", "c"] and tasks["a"] == tasks["c"] == TaskConfig()
    assert tasks["b-2.x"] == TaskConfig(symmetric=True, language="no", rows=12, instructions=["One", "Two: three"])


def test_all_mistakes_come_together_with_line_and_nearest_name(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text(
        "a:\n  symetric: true\n  rows: many\nb:\n  format: tdroo\n  instructions: One\nc: text\n"
        "d:\n  file:\n    name: x\ne:\n  rows: 1\n  rows: 2\nf:\n  symmetric: maybe\n"
    )
    with pytest.raises(ValueError) as caught:
        read_task_file(path)
    message = str(caught.value)
    for part in (
        "tasks.yaml:2: a task has no key 'symetric'. Did you mean symmetric?",
        "tasks.yaml:3: rows is 'many'; it must be a whole number",
        "task b: format is 'tdroo'",
        "Did you mean tdro?",
        "tasks.yaml:6: instructions is 'One'; it must be a list of texts",
        "tasks.yaml:7: c holds no keys",
        "tasks.yaml:9: file is",
        "rows is given twice",
        "tasks.yaml:15: symmetric is 'maybe'; it must be true or false",
    ):
        assert part in message, f"{part!r} is not in:\n{message}"


@pytest.mark.parametrize("content", ["", "{}\n", "- a\n", "a: [\n"])
def test_file_without_tasks_says_so(tmp_path, content):
    (tmp_path / "tasks.yaml").write_text(content)
    with pytest.raises(ValueError, match="tasks.yaml"):
        read_task_file(tmp_path / "tasks.yaml")
