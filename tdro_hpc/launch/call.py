"""The words after `submit` in, a Call out: what is to be done, with which config, and every mistake of the line."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tdro_hpc.config.load import ConfigError, LoadedConfig, load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.config.sweeps import Variation, variations
from tdro_hpc.launch.plan import stages_named
from tdro_hpc.launch.stage import Stage

PROGRAM = "python -m tdro_hpc.submit"
# Options of the call by word; everything else is a key of the configuration.
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "run": ("stage", "force", "dry_run", "check", "strict"),
    "status": ("watch",),
    "logs": ("stage", "follow"),
    "cancel": (),
    "report": (),
}
_SWITCHES = ("dry_run", "check", "strict", "follow", "watch")
_ALL_OPTIONS = tuple(dict.fromkeys(option for options in _OPTIONS.values() for option in options))


@dataclass(frozen=True)
class Call:
    """One line after `submit`, understood; of a sweep, the line of one of its runs."""

    word: str  # run, status, logs, cancel, report, help
    config: Config = field(default_factory=Config)
    names_run: bool = False  # name= or config= says which run is meant
    options: Mapping[str, str] = field(default_factory=dict)
    line: str = ""  # what to type to do the same again, without force=, which would throw away what it has made
    values: tuple[str, ...] = ()  # s1.eta=0.01: what tells this run of a sweep from the others
    notes: tuple[str, ...] = ()  # what was chosen for the line, in words
    sweep: tuple["Call", ...] = ()  # the runs of a sweep, this one the first; empty = the line is no sweep

    def is_on(self, switch: str) -> bool:
        """Whether dry_run, check, strict, follow or watch was given as true."""
        return self.options.get(switch) == "true"

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.runs_dir) / self.config.name

    @property
    def runs(self) -> tuple["Call", ...]:
        """The calls of all runs of the line."""
        return self.sweep or (self,)


def read_call(words: list[str], *, graph_of: Callable[[Config], dict[str, Stage]]) -> Call:
    """The call that the words after `submit` make.

    raises ConfigError with every mistake of the call
    """
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        return Call("help")
    word = words[0] if words[0] in _OPTIONS else "run"
    problems: list[str] = []
    options: dict[str, str] = {}
    keys: list[str] = []
    for argument in words[word != "run" :]:
        name, equals, value = argument.partition("=")
        if name not in _ALL_OPTIONS or not equals:
            keys.append(argument)
            continue
        problems += _option_problems(word, name, value, options)
        options[name] = value
    problems += _given_twice(keys)
    try:
        found = variations(keys)
    except ValueError as error:
        problems += str(error).split("\n")
        found = []
    loaded = [_loaded(variation, word, options, words, graph_of, problems) for variation in found]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    names_run = any(key.startswith(("name=", "config=")) for key in keys)
    calls = tuple(
        Call(
            word,
            one.config,
            names_run,
            options,
            _line(words, options, variation, one.config),
            variation.values,
            one.notes,
        )
        for variation, one in zip(found, loaded, strict=True)
    )
    return calls[0] if len(calls) == 1 else replace(calls[0], sweep=calls)


def _loaded(
    variation: Variation,
    word: str,
    options: Mapping[str, str],
    words: list[str],
    graph_of: Callable[[Config], dict[str, Stage]],
    problems: list[str],
) -> LoadedConfig:
    """Config of one run; what is wrong with it goes into the problems."""
    try:
        loaded = load_config(list(variation.arguments), call_options=_OPTIONS[word])
        config = loaded.config
        if variation.label:
            config = replace(config, name=f"{config.name}-{variation.label}")
        graph = graph_of(config)
    except ConfigError as error:
        problems += [_with_words(problem, words) for problem in error.problems]
        return LoadedConfig(Config(), {})
    except ValueError as error:
        problems.append(str(error))
        return LoadedConfig(Config(), {})
    if word == "run":
        for option in ("stage", "force"):
            problems += stages_named(options.get(option, ""), graph, config.stages)[1]
    return replace(loaded, config=config)


def _line(words: Sequence[str], options: Mapping[str, str], variation: Variation, config: Config) -> str:
    """What to type to continue this run alone."""
    single = {value.partition("=")[0]: value for value in variation.values}
    again = [argument for argument in words if not argument.startswith("force=")]
    if single:
        again = [single.get(argument.partition("=")[0].strip(), argument) for argument in again]
        again = [*(argument for argument in again if not argument.startswith("name=")), f"name={config.name}"]
    if "stage" not in options and "force" in options:
        again.append(f"stage={options['force']}")
    return shlex.join([*PROGRAM.split(), *again])


def _option_problems(word: str, name: str, value: str, options: Mapping[str, str]) -> list[str]:
    """What is wrong with one option of the call."""
    problems = []
    if name not in _OPTIONS[word]:
        owners = [owner for owner, allowed in _OPTIONS.items() if name in allowed]
        line = " or ".join(PROGRAM if owner == "run" else f"{PROGRAM} {owner}" for owner in owners)
        problems.append(f"{name}= means nothing here; it belongs to: {line}. Leave it out.")
    if name in options:
        problems.append(f"{name} is given twice: {name}={options[name]} and {name}={value}. Leave one out.")
    if name in _SWITCHES and value not in ("true", "false"):
        problems.append(f"{name} is {value!r}; it must be true or false. Type {name}=true.")
    if name not in _SWITCHES and not value:
        problems.append(f"{name}= is empty. Type {name}=s1, or leave it out.")
    return problems


def _given_twice(keys: list[str]) -> list[str]:
    """What is wrong where a key stands twice on the line."""
    first: dict[str, str] = {}
    problems = []
    for argument in keys:
        name = argument.partition("=")[0].strip()
        if "=" in argument and name in first:
            problems.append(f"{name} is given twice: {first[name]} and {argument}. Leave one out.")
        first.setdefault(name, argument)
    return problems


def _with_words(problem: str, words: list[str]) -> str:
    """A word that is no key=value may be one of ours in the wrong place."""
    misplaced = [word for word in _OPTIONS if word != "run" and word in words[1:] and f"'{word}'" in problem]
    if misplaced:
        return f"{misplaced[0]} has to be the first word after submit. Type: {PROGRAM} {misplaced[0]} [key=value ...]"
    if "=" not in words[0] and f"'{words[0]}'" in problem:
        return f"Unknown word {words[0]}. Type one of {', '.join(list(_OPTIONS)[1:])}, or key=value."
    return problem
