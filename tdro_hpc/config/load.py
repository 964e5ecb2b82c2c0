"""YAML and `key=value` in, one frozen Config out, or all mistakes of the call together. Never opens data.

Precedence, later wins:

1. the defaults of the dataclasses in schema.py
2. `use: {recipe: ...}` of the config file, then its picks of model, data, parallel and cluster
3. the other keys of the config file (`config=<name or path>`)
4. picks on the command line, recipe first; such a pick REPLACES its section: what the config file, its `use` and the
   recipe said of that section is dropped, because half of one model and half of another is nobody's wish
5. `key=value` on the command line; data.dir= or data.hub= also drops builder and tasks of a data set that the config
   file's `use` would have built, because the folder brings its own

A pick is a name, configs/<group>/<name>.yaml, or the path of a YAML file. Its keys are those of the section; a recipe
has keys of the top. A saved config holds every value and `use: {}`: no other file is read when it is loaded again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdro_hpc.atomic import write_text
from tdro_hpc.config.checks import cross_problems
from tdro_hpc.config.fitting import chosen_layout
from tdro_hpc.config.keys import PICKS, SECTIONS, Key, KeyPath, default_text, is_section, is_task, key_of
from tdro_hpc.config.layers import configs_folders, layered_entries
from tdro_hpc.config.mistakes import section_with_value, special_text, unknown_key, wrong_type
from tdro_hpc.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TaskConfig
from tdro_hpc.config.source import COMMAND_LINE, Entry, is_null, read_arguments, value_of

_SAVED_HEADER = "# Every value of a run. Nothing else is read when this file is given as config=<its path>.\nuse: {}\n"


class ConfigError(ValueError):
    """Everything wrong with one call; `problems` holds one sentence or more a mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class LoadedConfig:
    """A config and the places that its values came from."""

    config: Config
    sources: dict[str, str]  # dotted key -> "configs/demo.yaml:14" or "command line"; keys that nobody gave are absent
    notes: tuple[str, ...] = ()  # what was chosen, in words: parallel=auto


def load_config(
    arguments: list[str],
    *,
    configs_dirs: Sequence[Path] | None = None,
    call_options: tuple[str, ...] = (),
) -> LoadedConfig:
    """Config of a list of `key=value` and where its values came from.

    configs_dirs   folders with picks; None = those of configs_folders
    call_options   words of the caller's own (stage, force ...), only offered where a misspelt key resembles one
    raises         ConfigError with every mistake of the call
    """
    problems: list[str] = []
    folders = configs_folders() if configs_dirs is None else list(configs_dirs)
    entries = layered_entries(read_arguments(arguments, problems), folders, problems)
    tree = _Tree(problems, (*PICKS, *call_options))
    for entry in entries:
        tree.set(entry)
    config = tree.build()
    notes: list[str] = []
    if not problems and config.parallel.engine == "auto":
        config = _with_layout(config, notes, problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return LoadedConfig(config, {".".join(path): entry.source for path, entry in tree.given.items()}, tuple(notes))


def _with_layout(config: Config, notes: list[str], problems: list[str]) -> Config:
    """The config with the layout that parallel=auto stands for; what is chosen, or why nothing is, goes into a list."""
    try:
        parallel, words = chosen_layout(config)
    except ValueError as error:
        problems.append(str(error))
        return config
    notes.append(words)
    return dataclasses.replace(config, parallel=parallel)


def save_config(config: Config, path: Path) -> None:
    """Write every key of the config, atomically; `config=<path>` loads an equal one."""
    values = dataclasses.asdict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(separator in text for separator in "\x85\u2028\u2029"):
        # PyYAML writes these line separators as they are, but reads them as blanks.
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    write_text(Path(path), _SAVED_HEADER + text)


class _Tree:
    """The typed config being filled: OmegaConf converts, this class puts every refusal into words."""

    def __init__(self, problems: list[str], words: tuple[str, ...]) -> None:
        self.problems = problems
        self.words = words  # may be typed at the top besides keys
        self.given: dict[KeyPath, Entry] = {}  # the entry that decided a key
        self.broken: set[str] = set()  # top names with a mistake; no cross-section check looks at them
        self.tree = OmegaConf.structured(Config)
        self.nodes: dict[KeyPath, DictConfig] = {(): self.tree}  # sections met so far; a look-up in the tree is slow
        _unlock(self.tree)

    def set(self, entry: Entry) -> None:
        """Put one entry into the tree."""
        key = key_of(entry.path)
        if is_section(entry.path):
            self._open_section(entry)
        elif key is None:
            self.problems.append(unknown_key(entry, self.words))
        else:
            self._set_value(entry, key)

    def _open_section(self, entry: Entry) -> None:
        if not is_null(entry.node) and value_of(entry.node, None) != {}:
            self._refuse(entry, section_with_value(entry))
        elif is_task(entry.path):
            self._node(entry.path)
            self.given[entry.path] = entry

    def _set_value(self, entry: Entry, key: Key) -> None:
        value = value_of(entry.node, key)
        if any(map(_is_special, value if isinstance(value, list) else [value])):
            self._refuse(entry, special_text(entry, value))
            return
        try:
            self._node(entry.path[:-1])[entry.path[-1]] = value
        except OmegaConfBaseException:
            self._refuse(entry, wrong_type(entry, key, value))
        else:
            self.given[entry.path] = entry

    def _refuse(self, entry: Entry, problem: str) -> None:
        self.problems.append(problem)
        self.broken.add(entry.path[0])

    def _node(self, path: KeyPath) -> DictConfig:
        """The section at a path; a task is made when it is first spoken of."""
        if path not in self.nodes:
            parent = self._node(path[:-1])
            if is_task(path):
                parent[path[-1]] = TaskConfig()
                _unlock(parent[path[-1]])
            self.nodes[path] = parent[path[-1]]
        return self.nodes[path]

    def build(self) -> Config:
        """The frozen config; sections that refuse their values are left at their defaults and put into the problems."""
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            if "." in name:
                continue
            values = _plain(self.tree[name])
            if section is ParallelConfig:
                values["engine"] = self._engine(values)
            if section is ModelConfig:
                lora = self._checked("model", SECTIONS["model.lora"], values["lora"])
                values["lora"] = SECTIONS["model.lora"]() if lora is None else lora
            if section is DataConfig:
                values["tasks"] = self._tasks(values["tasks"])
            made = self._checked(name, section, values)
            sections[name] = section() if made is None else made
        for name in ("s0", "s1", "s2"):
            self._report(sections[name].problems(name))
        sound = {name: made for name, made in sections.items() if name not in self.broken}
        top = {field.name: _plain(self.tree[field.name]) for field in dataclasses.fields(Config)}
        config = Config(**{name: value for name, value in top.items() if name not in sections}, **sound)
        self._report(cross_problems(config, self.broken.copy()))
        return config

    def _engine(self, parallel: dict[str, Any]) -> str:
        """The engine that was given, or deepspeed where the words after it ask for what only that can do."""
        given, engine = self.given.get(("parallel", "engine")), parallel["engine"]
        if engine != "torch" or given is not None and given.source == COMMAND_LINE:
            return engine
        asked = [("parallel", key) for key in ("zero", "offload", "pp", "tp") if parallel[key] > (key in ("pp", "tp"))]
        later = [key for key in asked if given is None or self.given[key].source == COMMAND_LINE]
        return "deepspeed" if later else engine

    def _tasks(self, tasks: dict[str, dict[str, Any]]) -> dict[str, TaskConfig]:
        made = {name: self._checked("data", TaskConfig, task, f"data.tasks.{name}.") for name, task in tasks.items()}
        return {name: task for name, task in made.items() if task is not None}

    def _checked(self, top: str, section: type, values: dict[str, Any], prefix: str = "") -> Any:
        """Instance of a section, or None after its refusal has been put into the problems."""
        try:
            return section(**values)
        except ValueError as error:
            self.broken.add(top)
            self._report([prefix + line for line in str(error).splitlines()])
            return None

    def _report(self, messages: Sequence[str]) -> None:
        """Put messages that begin with a key into the problems, with the place of that key and what to type."""
        for message in messages:
            named = [path for path in self.given if message.startswith(".".join(path) + " ")]
            path = max(named, key=len, default=())
            dotted = ".".join(path) or message.partition(" ")[0]
            rest = message.removeprefix(dotted)
            self.broken.add(dotted.partition(".")[0])
            key = key_of(path)
            if key is not None and "Type " not in rest and "Set " not in rest:
                rest += f" Type {dotted}={default_text(key.default)}."
            self.problems.append(f"{dotted} {self.given[path].place}{rest}" if path else message)


def _unlock(node: DictConfig) -> None:
    # OmegaConf makes the node of a frozen dataclass read-only, each one by its own flag.
    OmegaConf.set_readonly(node, None)
    for value in node.values():
        if isinstance(value, DictConfig):
            _unlock(value)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if isinstance(node, (DictConfig, ListConfig)) else node


def _is_special(value: Any) -> bool:
    """Whether OmegaConf would take a text for a reference to another key or for a missing value."""
    return isinstance(value, str) and ("${" in value or value == "???")
