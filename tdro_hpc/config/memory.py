"""A config, a layout and the sizes of a model in, the memory of one rank out, item by item, as equations. Pure.

The figures are those of the fullest rank at its fullest moment: the backward of the largest chunk of a step after the
first. GB are 10^9 bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tdro_hpc.config.activations import ALL_LINEAR, BYTES, Pass, is_target, layer_bytes, layer_matrices, types_of
from tdro_hpc.config.figures import ModelFigures
from tdro_hpc.config.layouts import Layout
from tdro_hpc.config.schema import Config, ModelConfig, S1Config, TrainingConfig

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
ZERO_BUCKET = 200_000_000  # numbers that DeepSpeed reduces together (parallel/zero/engine.py)
PIPELINE_BUCKET = 1 << 26  # the same in a pipeline (parallel/pipeline/engine.py)
_GATHERED = 1_000_000_000  # weights that ZeRO-3 keeps gathered while they may be needed again: DeepSpeed's default
_LOSS_TILES = 240 << 20  # scores and copied embeddings of the loss on a GPU at most (docs/loss.md)
_CONTEXT = 1_000_000_000  # what CUDA, its libraries and NCCL take before anything is allocated
_MASTERS, _MOMENTS = 4, 8  # bytes a trained parameter, always float32


@dataclass(frozen=True)
class Item:
    """One line of the table."""

    name: str
    num_bytes: int
    equation: str


@dataclass(frozen=True)
class Estimate:
    """Memory of the fullest rank of a stage."""

    items: tuple[Item, ...]
    num_chunks: int  # passes of one micro-step
    bubble: float  # share of the time in which a rank of the pipeline waits, 0 to 1

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(item.num_bytes for item in self.items)

    @property
    def held(self) -> int:
        """Bytes that no choice of batch, chunk or checkpointing makes smaller."""
        return sum(item.num_bytes for item in self.items if item.name in ("weights", "optimiser", "reference"))


@dataclass(frozen=True)
class _Texts:
    """What a rank embeds in one micro-step."""

    passes: tuple[tuple[int, int], ...]  # (tokens, tokens of the longest row) of what is embedded at once, at most
    later: tuple[tuple[int, int], ...]  # the largest of the passes that come when there are gradients already
    num_chunks: int
    queries: int
    passages: int


@dataclass(frozen=True)
class _Part:
    """What a rank of one stage of the pipeline holds (numbers, not bytes)."""

    layers: int
    weights: int  # of the model
    adapters: int
    trained: int
    in_flight: int  # chunks whose activations it holds at once


def estimate_memory(config: Config, kind: str, layout: Layout, figures: ModelFigures, *, parameters: int) -> Estimate:
    """Memory of the fullest rank of a training stage.

    kind        s0, s1 or s2
    layout      engine and mesh; the ranks of a CPU profile have no CUDA context
    parameters  of the whole model
    """
    section: TrainingConfig = getattr(config, kind)
    texts = _texts(config, section, chunked=config.loss.gradient_cache or layout.spread > 1)
    choices = [
        _items(config, section, layout, figures, texts, part)
        for part in _parts(config.model, figures, layout, texts, parameters)
    ]
    fullest = max(choices, key=lambda items: sum(item.num_bytes for item in items))
    bubble = (layout.pp - 1) / (texts.num_chunks + layout.pp - 1)
    return Estimate(tuple(item for item in fullest if item.num_bytes), texts.num_chunks, bubble)


def _texts(config: Config, section: TrainingConfig, *, chunked: bool) -> _Texts:
    queries, passages = section.queries_per_rank, section.queries_per_rank * section.passages_per_query
    lengths = [task.query_max_tokens for task in config.data.tasks.values()]
    longest_query = max([config.data.query_max_tokens, *lengths])
    lengths = [task.passage_max_tokens for task in config.data.tasks.values()]
    longest_passage = max([config.data.passage_max_tokens, *lengths])
    sides = [(queries, longest_query), (passages, longest_passage)]
    if not chunked:
        whole = tuple((rows * length, length) for rows, length in sides)
        return _Texts(whole, whole if section.accumulation_steps > 1 else (), 1, queries, passages)
    fitting = [min(rows, max(1, config.loss.chunk_tokens // length)) for rows, length in sides]
    numbers = [-(-rows // fit) for (rows, _), fit in zip(sides, fitting, strict=True)]
    sizes = [(fit * length, length) for (_, length), fit in zip(sides, fitting, strict=True)]
    # The largest chunk is the first of the second pass.
    in_order = sorted((size for size, number in zip(sizes, numbers, strict=True) for _ in range(number)), reverse=True)
    later = in_order if section.accumulation_steps > 1 else in_order[1:]
    return _Texts(tuple(in_order[:1]), tuple(later[:1]), sum(numbers), queries, passages)


def _parts(
    model: ModelConfig, figures: ModelFigures, layout: Layout, texts: _Texts, parameters: int
) -> Iterator[_Part]:
    """The stages of the pipeline, or the one part that is the whole model."""
    table = figures.vocabulary * figures.width
    matrices = layer_matrices(figures)
    small = 0 if figures.is_encoder else (parameters - table - figures.width) // figures.layers - matrices
    few, over = divmod(figures.layers, layout.pp)
    for stage in range(layout.pp):
        layers = few + (stage >= layout.pp - over)
        weights = parameters
        if layout.spread > 1:
            ends = table * (stage == 0) + figures.width * (stage == layout.pp - 1)
            weights = layers * (matrices // layout.tp + small) + ends
        adapters = layers * _adapters_of_layer(model, figures, layout.tp) if model.lora.enabled else 0
        trained = adapters if model.lora.enabled else weights
        yield _Part(layers, weights, adapters, trained, min(layout.pp - stage, texts.num_chunks))


def _adapters_of_layer(model: ModelConfig, figures: ModelFigures, tensor_size: int) -> int:
    """Numbers in the low-rank updates of a layer on one rank: the factor on the side that is split is split too."""
    width, inner, keys = figures.width, figures.inner // tensor_size, figures.key_width // tensor_size
    queries = figures.query_width // tensor_size
    sides = dict(zip(ALL_LINEAR, (queries, keys, keys, queries, inner, inner, inner), strict=True))
    if figures.is_encoder:
        sides.pop("gate_proj")
    return model.lora.rank * sum(width + side for name, side in sides.items() if is_target(name, model.lora))


def _items(
    config: Config, section: TrainingConfig, layout: Layout, figures: ModelFigures, texts: _Texts, part: _Part
) -> list[Item]:
    model = config.model
    has_reference = isinstance(section, S1Config) and section.reference_losses == "online"
    gradients = _gradients(model, section, layout, texts, part)
    # The buckets of torch's data parallelism are there always.
    early = layout.engine == "torch" and layout.dp > 1
    items = [
        _weights("weights", model, layout, part),
        _optimiser(model, layout, part),
        gradients,
        _activations(config, layout, figures, texts, part, beside=0 if early else gradients.num_bytes),
        _embeddings(config, section, layout, figures, texts),
        _buffers(config, layout, figures, texts, part, gathered_models=1 + has_reference),
    ]
    if has_reference:
        items.insert(1, _weights("reference", model, layout, part))
    if config.cluster.gpus_per_node:
        items.append(Item("CUDA", _CONTEXT, "context, libraries and NCCL"))
    return items


def _weights(name: str, model: ModelConfig, layout: Layout, part: _Part) -> Item:
    a_weight = BYTES[model.weights_dtype]
    text = f"{part.weights:,} parameters x {a_weight} bytes"
    total = part.weights * a_weight + part.adapters * 4
    if part.adapters:
        text += f" + {part.adapters:,} of LoRA x 4"
    if layout.zero == 3:
        return Item(name, total // layout.dp, f"({text}) / {layout.dp} dp")
    return Item(name, total, text)


def _optimiser(model: ModelConfig, layout: Layout, part: _Part) -> Item:
    a_parameter, words = _MOMENTS, "8 Adam"
    if layout.engine == "torch" and not model.lora.enabled and model.weights_dtype != "float32":
        a_parameter, words = _MOMENTS // 2, "4 Adam"  # its moments have the type of the parameter
    elif layout.zero or layout.engine == "deepspeed" and model.weights_dtype != "float32":
        a_parameter, words = _MASTERS + _MOMENTS, "4 float32 master + 8 Adam"
    text = f"{part.trained:,} trained x {a_parameter} bytes ({words})"
    if layout.offload:
        return Item("optimiser", 0, text)
    if layout.zero:
        return Item("optimiser", part.trained * a_parameter // layout.dp, f"{text} / {layout.dp} dp")
    return Item("optimiser", part.trained * a_parameter, text)


def _gradients(model: ModelConfig, section: TrainingConfig, layout: Layout, texts: _Texts, part: _Part) -> Item:
    a_gradient = 4 if model.lora.enabled or layout.engine == "deepspeed" else BYTES[model.weights_dtype]
    text, total = f"{part.trained:,} trained x {a_gradient} bytes", part.trained * a_gradient
    if layout.zero >= 2:
        return Item("gradients", total // layout.dp, f"{text} / {layout.dp} dp")
    if layout.engine == "torch" and layout.dp > 1 and texts.num_chunks * section.accumulation_steps > 1:
        return Item("gradients", 2 * total, f"{text} x 2 (sums over chunks, and the buckets that ranks average)")
    return Item("gradients", total, text)


def _activations(
    config: Config, layout: Layout, figures: ModelFigures, texts: _Texts, part: _Part, *, beside: int
) -> Item:
    """beside: bytes of gradients that come as the activations go; 0 where they are there before."""
    first = _activation_bytes(config, layout, figures, texts.passes, part)
    later = _activation_bytes(config, layout, figures, texts.later, part)
    tokens = sum(tokens for tokens, _ in texts.passes)
    text = f"{tokens:,} tokens x {part.layers} layers" + (f" x {part.in_flight} under way" if layout.pp > 1 else "")
    text += ", inputs of each + one in full" if config.model.gradient_checkpointing else ", all"
    if first - beside <= later:
        return Item("activations", later, text)
    more = ", less the gradients, which come as they go" if beside else ""
    return Item("activations", first - beside, text + more)


def _activation_bytes(
    config: Config, layout: Layout, figures: ModelFigures, passes: tuple[tuple[int, int], ...], part: _Part
) -> int:
    """What is kept for the backward of all passes together, and what the backward itself takes."""
    model, kept, works, casts = config.model, 0, 0, 0
    for tokens, row_tokens in passes:
        at = Pass(tokens, row_tokens, _is_masked(config), config.cluster.gpus_per_node > 0, layout.tp)
        layer = layer_bytes(figures, model, at)
        kept += part.in_flight * part.layers * (layer.entering if model.gradient_checkpointing else layer.saved)
        works += layer.working + (layer.saved if model.gradient_checkpointing else 0)
    if passes and types_of(model).casts and model.gradient_checkpointing and not model.lora.enabled:
        # Copies of trained matrices in the type of autocast stay to the end of the forward.
        casts = 2 * part.layers * layer_matrices(figures) // layout.tp
    return kept + max(works, casts)


def _is_masked(config: Config) -> bool:
    """Whether each attention gets a mask: padded rows without the flash-attn package."""
    return config.model.attention in ("auto", "sdpa", "eager")


def _embeddings(config: Config, section: TrainingConfig, layout: Layout, figures: ModelFigures, texts: _Texts) -> Item:
    own = texts.queries + texts.passages
    copies = 3 if texts.num_chunks > 1 else 2
    total = copies * own * figures.width * 4
    text = f"{own:,} texts x {figures.width:,} x 4 bytes x {copies} (with their gradients)"
    others = (layout.dp - 1) * texts.passages
    if section.negatives == "world" and others:
        columns = layout.dp * texts.passages
        if columns * figures.width * 4 > config.loss.ring_above_mb * 1_000_000:
            columns, words = 4 * texts.passages, "columns that go round the ranks"
        else:
            words = f"columns of {layout.dp} dp"
        total += 2 * columns * figures.width * 4
        text += f" + {columns:,} {words} x {figures.width:,} x 4 bytes x 2"
    return Item("embeddings", total, text)


def _buffers(
    config: Config, layout: Layout, figures: ModelFigures, texts: _Texts, part: _Part, *, gathered_models: int
) -> Item:
    """What engines and the loss hold for a while."""
    total, words = 0, []
    table = figures.vocabulary * figures.width if not config.model.lora.enabled else 0
    if layout.zero:
        most = PIPELINE_BUCKET if layout.spread > 1 else max(table, ZERO_BUCKET)
        a_gradient = BYTES[config.model.weights_dtype] if layout.zero == 3 and not config.model.lora.enabled else 4
        total += a_gradient * min(part.trained, most)
        words.append("a bucket of gradients")
    if layout.zero in (1, 2):
        total += 4 * part.trained // layout.dp
        words.append("the flat ones of a step")
    if layout.zero == 3:
        total += gathered_models * BYTES[config.model.weights_dtype] * min(part.weights, _GATHERED)
        words.append("gathered weights")
    if layout.pp > 1:
        total += 2 * part.in_flight * texts.passes[0][0] * figures.width * BYTES[config.model.weights_dtype]
        words.append("hidden states between stages")
    if config.cluster.gpus_per_node:
        total += _LOSS_TILES
        words.append("tiles of the loss")
    return Item("buffers", total, ", ".join(words))


def size_words(num_bytes: float) -> str:
    """Bytes in the unit a person would choose, to three digits."""
    unit, size = next(((unit, size) for unit, size in _UNITS if num_bytes >= size), _UNITS[-1])
    number = num_bytes / size
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}"


def bubble_equation(layout: Layout, estimate: Estimate) -> str:
    """Share of the time that the stages of a pipeline wait for each other; empty without a pipeline."""
    if layout.pp == 1:
        return ""
    return (
        f"pipeline bubble {math.ceil(estimate.bubble * 1000) / 10:g} % = ({layout.pp} pp - 1) / "
        f"({estimate.num_chunks:,} chunks + {layout.pp} pp - 1)"
    )
