"""Every key that a run knows, with its default. Values only: nothing here reads a file or touches a tensor.

Precedence is dataclass < YAML < key=value (load.py). The defaults of s0, s1 and s2 are the paper's (arXiv 2408.10613,
appendix) or, where the paper is silent, those of its released scripts.
"""

from dataclasses import dataclass, field

from tdro_hpc.config.bounds import above, at_least, between, one_of, require
from tdro_hpc.config.cluster import ClusterConfig
from tdro_hpc.config.export import ExportConfig

POOLINGS = ("last", "mean", "cls")
SIMILARITIES = ("cosine", "dot")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "padding_free")
NEGATIVES = ("group", "task", "batch", "world")
BATCHINGS = ("homogeneous", "mixed")
MEASUREMENTS = ("ratio_of_means", "mean_of_ratios", "excess", "loss")
WEIGHT_OPTIMIZERS = ("sgd", "adamw", "adagrad", "rmsprop")
ENGINES = ("torch", "deepspeed", "auto")
LOSS_IMPLEMENTATIONS = ("auto", "fused", "torch")
_WITH_DEEPSPEED = "Type parallel.engine=deepspeed, or leave it out."
FORMATS = ("tdro", "llm_embedder", "pairs", "beir", "msmarco")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; the defaults are those of the released models."""

    enabled: bool = True  # false = all parameters are trained
    rank: int = 8  # width of the low-rank update
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.1  # on the input of the update, in training only
    targets: str = "all-linear"  # all-linear, or module names separated by commas

    def __post_init__(self) -> None:
        require(
            at_least("model.lora.rank", self.rank, 1, "8 to 64")
            + above("model.lora.alpha", self.alpha, 0, "16 to 64")
            + between("model.lora.dropout", self.dropout, 0, 0.99, "0 to 0.1")
        )


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, how text goes into it, and how one vector comes out."""

    name: str = "Qwen/Qwen1.5-0.5B"  # hub id, folder, package:<Python package with a model>, tiny:<architecture>
    revision: str = ""  # commit or tag of the hub id; empty = newest
    pooling: str = "last"  # last, mean or cls
    similarity: str = "cosine"  # cosine or dot
    append_eos: bool = True  # the end token by id after truncation, whatever the tokenizer does
    padding_side: str = "right"  # right or left
    attention: str = "auto"  # auto, sdpa, eager, flash_attention_2, padding_free (packed sequences, no padding)
    bidirectional: bool = False  # decoders only: every token sees every token
    autocast: str = "bfloat16"  # type of the matrix products: float32 = no autocast
    weights_dtype: str = "float32"  # type in which the weights are held and updated
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    trust_remote_code: bool = False  # true runs Python code from the model's repository: only for models you trust
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(
            one_of("model.pooling", self.pooling, POOLINGS)
            + one_of("model.similarity", self.similarity, SIMILARITIES)
            + one_of("model.padding_side", self.padding_side, ("right", "left"))
            + one_of("model.attention", self.attention, ATTENTIONS)
            + one_of("model.autocast", self.autocast, DTYPES)
            + one_of("model.weights_dtype", self.weights_dtype, DTYPES)
        )


@dataclass(frozen=True)
class TaskConfig:
    """One task: where its rows are and how they are used."""

    file: str = ""  # name inside data.dir (or inside the hub data set); empty = found by the task's name
    format: str = "tdro"  # tdro, llm_embedder, pairs, beir, msmarco
    language: str = ""  # ISO codes separated by commas
    category: str = ""  # news, web, code ...: for tables and pooling of tasks
    symmetric: bool = False  # true = passages carry the instruction too
    rows: int = 0  # published number of rows, for plans made before the data is here; 0 = not known
    instructions: list[str] = field(default_factory=list)  # one is drawn a use; none = no instruction
    negatives: str = "stage"  # stage = the policy of the stage; group = own hard negatives only (classification style)
    query_max_tokens: int = 0  # 0 = data.query_max_tokens
    passage_max_tokens: int = 0  # 0 = data.passage_max_tokens

    def __post_init__(self) -> None:
        require(
            one_of("format", self.format, FORMATS)
            + one_of("negatives", self.negatives, ("stage", "group"))
            + at_least("query_max_tokens", self.query_max_tokens, 0, "0 or 32 to 512")
            + at_least("passage_max_tokens", self.passage_max_tokens, 0, "0 or 64 to 1024")
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the tasks are, and how their rows become tokens."""

    dir: str = ""  # folder of task files; an optional tasks.yaml in it describes them
    hub: str = ""  # data set id on the Hugging Face hub, used where data.dir is empty
    hub_revision: str = ""  # commit or tag of data.hub; empty = newest
    builder: str = ""  # embedded = made on the spot by stage prepare from the documentation on this machine
    cache_dir: str = ""  # unpacked files and row indexes; empty = beside the file, else ~/.cache/tdro_hpc
    on_bad_row: str = "raise"  # raise, or skip (counted and reported)
    query_max_tokens: int = 128  # end token included
    passage_max_tokens: int = 512  # end token included
    loader_workers: int = 2  # processes that read and tokenise ahead; 0 = in the training process
    only: str = ""  # task names separated by commas; empty = all
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # name -> description; empty = what data.dir holds

    def __post_init__(self) -> None:
        require(
            one_of("data.on_bad_row", self.on_bad_row, ("raise", "skip"))
            + one_of("data.builder", self.builder, ("", "embedded"))
            + at_least("data.query_max_tokens", self.query_max_tokens, 2, "32 to 512")
            + at_least("data.passage_max_tokens", self.passage_max_tokens, 2, "64 to 1024")
            + at_least("data.loader_workers", self.loader_workers, 0, "0 to 4")
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a stage work together: docs/parallel.md. Ranks of a run = pp x dp x tp."""

    engine: str = "torch"  # torch = one process or DistributedDataParallel; deepspeed; auto = a layout that fits
    zero: int = 0  # deepspeed: 1 splits the optimiser over the data ranks, 2 the gradients too, 3 the weights too
    offload: bool = False  # deepspeed, zero 1 to 3: optimiser and masters live in the memory of the node
    pp: int = 1  # deepspeed: stages of the pipeline, each holds a part of the layers
    tp: int = 1  # deepspeed: ranks that share every layer
    dp: int = 0  # data ranks, each reads its own rows; 0 = what is left of the ranks, else checked
    backend: str = "auto"  # auto = nccl where CUDA is, else gloo
    threads_per_rank: int = 0  # CPU threads of one rank; 0 = cores of the node divided by its ranks
    timeout_seconds: int = 1800  # a collective that waits longer ends the run

    def __post_init__(self) -> None:
        require(
            one_of("parallel.engine", self.engine, ENGINES)
            + between("parallel.zero", self.zero, 0, 3, "0 to 3")
            + at_least("parallel.pp", self.pp, 1, "1 to 8")
            + at_least("parallel.tp", self.tp, 1, "1 to 8")
            + at_least("parallel.dp", self.dp, 0, "0")
            + one_of("parallel.backend", self.backend, ("auto", "gloo", "nccl"))
            + at_least("parallel.threads_per_rank", self.threads_per_rank, 0, "0")
            + at_least("parallel.timeout_seconds", self.timeout_seconds, 10, "600 to 3600")
            + self._layout_problems()
        )

    def _layout_problems(self) -> list[str]:
        """What the engine cannot do, whatever the model and the number of ranks."""
        asked = [(key, getattr(self, key)) for key in ("zero", "offload", "pp", "tp")]
        given = [f"parallel.{key} is {str(value).lower()}" for key, value in asked if value > (key in ("pp", "tp"))]
        axes = f"parallel.pp={self.pp} parallel.tp={self.tp}"
        if self.engine == "torch" and given:
            return [f"{given[0]}, but parallel.engine is 'torch', which keeps all on every rank. {_WITH_DEEPSPEED}"]
        if self.engine == "auto" and (given or self.dp):
            key = given[0] if given else f"parallel.dp is {self.dp}"
            return [f"{key}, but parallel.engine is 'auto', which chooses the layout. {_WITH_DEEPSPEED}"]
        if self.zero > 1 and self.pp * self.tp > 1:
            return [
                f"parallel.zero is {self.zero} with {axes}: pipelines and tensor parallelism go with ZeRO-1 at most, "
                f"which splits the optimiser. Type parallel.zero=1, or parallel.pp=1 parallel.tp=1."
            ]
        if self.offload and (self.zero == 0 or self.pp * self.tp > 1):
            at = f"parallel.zero={self.zero} {axes}"
            return [
                f"parallel.offload is true with {at}: what is moved to the node's memory is the part of the optimiser "
                "that ZeRO gives to a rank, without a pipeline. Type parallel=zero3_offload, or parallel.offload=false."
            ]
        return []


@dataclass(frozen=True)
class LossConfig:
    """Which columns count as negatives, how the loss is computed, and in what chunks texts are embedded."""

    mask_duplicates: bool = True  # columns with the text of the row's positive do not count as negatives
    mask_known_positives: bool = True  # nor do other positives of the row's record
    false_negative_margin: float | None = None  # columns scoring above positive - margin do not count; in cosine units
    implementation: str = "auto"  # auto = compiled kernels where they are built, else torch; fused, torch
    ring_above_mb: int = 2048  # columns of all ranks above this many MB go round the ranks, else each rank gets all
    workspace_mb: int = 16  # the compiled loss on CPUs may use this beside its gradients; with more it repeats less
    gradient_cache: bool = False  # embed in chunks, exact gradients, memory of one chunk
    chunk_tokens: int = 4096  # tokens of one chunk under gradient_cache, padding included; at least one text

    def __post_init__(self) -> None:
        require(
            one_of("loss.implementation", self.implementation, LOSS_IMPLEMENTATIONS)
            + at_least("loss.ring_above_mb", self.ring_above_mb, 0, "2048; 0 = always")
            + at_least("loss.workspace_mb", self.workspace_mb, 1, "16 to 1024")
            + at_least("loss.chunk_tokens", self.chunk_tokens, 1, "2048 to 65536")
        )


@dataclass(frozen=True)
class TrainingConfig:
    """What s0, s1 and s2 have in common; the defaults are those of s0 and s2."""

    steps: int = 1000  # optimiser steps
    queries_per_rank: int = 256  # queries of one rank in one micro-step
    accumulation_steps: int = 1  # micro-steps of one optimiser step
    passages_per_query: int = 2  # 1 positive + hard negatives
    batching: str = "homogeneous"  # homogeneous = one task a global micro-batch; mixed = rows of all tasks
    weights: str = "uniform"  # uniform, size, temperature:<exponent>, or a weights JSON
    stratified: bool = False  # mixed only: every task is in every optimiser step
    negatives: str = "world"  # columns of a row: group, task, batch, world
    temperature: float = 0.002  # divides the scores; > 0
    learning_rate: float = 1e-4  # peak, after warm-up
    min_learning_rate_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_steps: int = 100  # linear from 0
    weight_decay: float = 0.1  # AdamW, on matrices; norms and biases are left out as in the released runs' trainer
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global L2 norm; 0 = no clipping
    save_every_steps: int = 100  # a checkpoint this often, and at every stop
    keep_checkpoints: int = 2  # newest ones kept
    log_every_steps: int = 10  # a line and a metrics row this often

    def problems(self, stage: str) -> list[str]:
        """Everything wrong with the values, in words; `stage` is put before the key, as in s0.steps."""
        at = f"{stage}."
        return (
            at_least(at + "steps", self.steps, 1, "1000")
            + at_least(at + "queries_per_rank", self.queries_per_rank, 1, "16 to 256")
            + at_least(at + "accumulation_steps", self.accumulation_steps, 1, "1 to 16")
            + at_least(at + "passages_per_query", self.passages_per_query, 1, "2 to 8")
            + one_of(at + "batching", self.batching, BATCHINGS)
            + one_of(at + "negatives", self.negatives, NEGATIVES)
            + above(at + "temperature", self.temperature, 0, "0.002 to 0.05")
            + above(at + "learning_rate", self.learning_rate, 0, "1e-5 to 1e-3")
            + between(at + "min_learning_rate_ratio", self.min_learning_rate_ratio, 0, 1, "0.1")
            + at_least(at + "warmup_steps", self.warmup_steps, 0, "100")
            + at_least(at + "weight_decay", self.weight_decay, 0, "0.1")
            + between(at + "adam_beta1", self.adam_beta1, 0, 0.9999, "0.9")
            + between(at + "adam_beta2", self.adam_beta2, 0, 0.999999, "0.999")
            + above(at + "adam_epsilon", self.adam_epsilon, 0, "1e-8")
            + at_least(at + "max_grad_norm", self.max_grad_norm, 0, "1.0; 0 = off")
            + at_least(at + "save_every_steps", self.save_every_steps, 1, "100 to 1000")
            + at_least(at + "keep_checkpoints", self.keep_checkpoints, 1, "2")
            + at_least(at + "log_every_steps", self.log_every_steps, 1, "10")
            + self._warmup_problems(at)
        )

    def _warmup_problems(self, at: str) -> list[str]:
        if not 0 < self.steps < self.warmup_steps:
            return []
        return [
            f"{at}warmup_steps is {self.warmup_steps}, more than {at}steps={self.steps}: the learning rate would never "
            f"reach its peak. Type {at}warmup_steps={self.steps // 10}."
        ]


@dataclass(frozen=True)
class S1Config(TrainingConfig):
    """Stage s1: the proxy's training, and how the weights of the tasks follow from its losses."""

    queries_per_rank: int = 64
    accumulation_steps: int = 4
    passages_per_query: int = 8
    batching: str = "mixed"
    stratified: bool = True  # the released code draws i.i.d. and counts a missing task as 0
    negatives: str = "group"
    eta: float = 0.02  # step of the weights on log alpha; the gradient has unit L2 length
    measurement: str = "ratio_of_means"  # ratio_of_means, mean_of_ratios (released code), excess, loss: docs/s1.md
    weight_optimizer: str = "sgd"  # sgd, adamw, adagrad, rmsprop: ascent on log alpha
    ema: float = 0.1  # share of the newest weights in the running EMA
    reference_losses: str = "online"  # online = the reference runs beside the proxy; cached = computed once, then read
    top_percents: str = "20,30,40,50,60,70,80,90"  # top<p>_weights.json: the best p percent of the tasks, uniform

    def problems(self, stage: str) -> list[str]:
        return (
            super().problems(stage)
            + above("s1.eta", self.eta, 0, "0.02")
            + one_of("s1.measurement", self.measurement, MEASUREMENTS)
            + one_of("s1.weight_optimizer", self.weight_optimizer, WEIGHT_OPTIMIZERS)
            + between("s1.ema", self.ema, 0, 1, "0.1")
            + one_of("s1.reference_losses", self.reference_losses, ("online", "cached"))
            + self._cached_problems()
        )

    def _cached_problems(self) -> list[str]:
        if self.reference_losses != "cached" or self.negatives == "group":
            return []
        return [
            f"s1.reference_losses is 'cached', but s1.negatives is {self.negatives!r}: the loss of a row then depends "
            "on the rows beside it. Type s1.negatives=group or s1.reference_losses=online."
        ]


@dataclass(frozen=True)
class S2Config(TrainingConfig):
    """Stage s2: the retriever's training with the weights that s1 made."""

    weights: str = "curr"  # of s1: curr, mean, ema, top20 ... top90, or a JSON file; several by commas: one model each
    transfer: str = "sampling"  # sampling = tasks are drawn by weight; loss = drawn uniformly, loss times k x weight

    def problems(self, stage: str) -> list[str]:
        return super().problems(stage) + one_of("s2.transfer", self.transfer, ("sampling", "loss"))


@dataclass(frozen=True)
class EvalConfig:
    """Stage eval: what is evaluated, on which test sets, and how texts are encoded and searched."""

    dir: str = ""  # folder of test sets, each in BEIR layout; empty = the embedded ones where data.builder is set
    sets: str = ""  # names separated by commas; empty = all in eval.dir
    models: str = "base,s0,s2"  # columns of the table: base, bm25, s0, s1, s2 (all of s2), s2-<weights>, or folders
    instruction: str = "Given a query, retrieve passages that answer or match it"  # before test queries; empty = none
    base_instruction: str = ""  # the same for `base`, which no stage has trained with instructions
    query_max_tokens: int = 128
    passage_max_tokens: int = 512
    batch_tokens: int = 16384  # tokens of one encoded batch; texts are sorted by length
    top_k: int = 1000  # documents kept a query in the run file
    search: str = "auto"  # auto = torch on a GPU, else faiss where installed, else torch; faiss, torch

    def __post_init__(self) -> None:
        require(
            at_least("eval.query_max_tokens", self.query_max_tokens, 2, "64 to 512")
            + at_least("eval.passage_max_tokens", self.passage_max_tokens, 2, "128 to 512")
            + at_least("eval.batch_tokens", self.batch_tokens, 1, "4096 to 65536")
            + at_least("eval.top_k", self.top_k, 100, "1000")
            + one_of("eval.search", self.search, ("auto", "faiss", "torch"))
        )


@dataclass(frozen=True)
class EmbeddedConfig:
    """How stage prepare builds the embedded data set (data.builder=embedded)."""

    max_rows_per_task: int = 2500  # training rows of one task at most
    test_queries: int = 150  # queries of one test set at most
    test_documents: int = 1200  # documents of one test set at most
    hard_negatives: int = 8  # BM25 negatives a row

    def __post_init__(self) -> None:
        require(
            at_least("embedded.max_rows_per_task", self.max_rows_per_task, 50, "2500")
            + at_least("embedded.test_queries", self.test_queries, 10, "150")
            + at_least("embedded.test_documents", self.test_documents, 50, "1200")
            + at_least("embedded.hard_negatives", self.hard_negatives, 1, "8")
        )


@dataclass(frozen=True)
class LoggingConfig:
    """What is written besides metrics.jsonl, which always is."""

    tensorboard: bool = False  # also writes <stage>/tensorboard
    plots: bool = True  # PNG files and report.html at the end of each stage


@dataclass(frozen=True)
class Config:
    """One run. Sections are handed to the code that needs them, never the whole."""

    name: str = "default"  # the run lives in <runs_dir>/<name>
    runs_dir: str = "runs"
    seed: int = 42
    recipe: str = "tdro"  # named chain of stages: configs/recipe/<name>.yaml
    stages: list[str] = field(default_factory=lambda: ["s0", "s1", "s2", "eval"])  # what stage=all means
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    embedded: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    s0: TrainingConfig = field(default_factory=TrainingConfig)
    s1: S1Config = field(default_factory=S1Config)
    s2: S2Config = field(default_factory=S2Config)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        require(self.s0.problems("s0") + self.s1.problems("s1") + self.s2.problems("s2"))
