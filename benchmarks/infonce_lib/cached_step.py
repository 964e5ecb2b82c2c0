"""A whole step with gradient caching, from tokens to the gradients of all parameters, beside sentence-transformers'."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from infonce_lib.report import STAR, Report, megabytes, ratio, ratio_cell, seconds_cell, verdict
from infonce_lib.rounds import Figure
from infonce_lib.tables import Session
from infonce_lib.worker import Job
from tdro_hpc.config.schema import LossConfig

ROWS, TEMPERATURE, PAD = 64, 0.05, 0
QUERY_TOKENS, PASSAGE_TOKENS = (8, 32), (16, 256)  # mixed: uniform between the two
EQUAL_QUERY_TOKENS, EQUAL_PASSAGE_TOKENS = 32, 128  # equal: no padding in any batch
MINI_BATCH_SIZE = 32
CHUNK_TOKENS = LossConfig().chunk_tokens
SAME = 1e-3  # relative difference of loss and gradient norm that sums in another order explain
VOCABULARY = 260  # of the byte tokenizer that stands beside the model
NOTES = {
    "ST cached": "sentence-transformers' CachedMultipleNegativesRankingLoss at its defaults (mini_batch_size=32)",
    "ST cached, tokens": f"the same with mini_batch_num_tokens={CHUNK_TOKENS}",
    "ST plain": "its MultipleNegativesRankingLoss, no caching",
    "ours plain": "no caching, packed sequences",
    "ours plain, padded": "no caching, model.attention=sdpa",
    "ours cached, padded": f"gradient caching in chunks of {CHUNK_TOKENS} tokens, model.attention=sdpa",
    "ours cached": f"gradient caching in chunks of {CHUNK_TOKENS} tokens, packed sequences",
}


class StepWorkload:
    """One side's step on a random BERT of six layers and width 384, without dropout."""

    def __init__(self, name: str, rows: int, lengths: str) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.manual_seed(0)
        parts = [_tokens(rows, 1, "query", lengths), _tokens(rows, 2, "passage", lengths)]
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder))
            side: _Ours | _SentenceTransformers
            side = _Ours(name, Path(folder)) if name.startswith("ours") else _SentenceTransformers(name, Path(folder))
        self.model, self.step = side.model, side.step_on(parts)
        self.gradient_bytes = sum(each.nbytes for each in self.model.parameters() if each.requires_grad)

    def check(self) -> dict[str, float]:
        """Loss and gradient norm, for the table to compare."""
        loss = self.run()
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.model.parameters() if each.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"loss": float(loss), "gradient norm": float(norm)}

    def run(self) -> Tensor:
        """Gradients of all parameters; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        return self.step()


def _tokens(rows: int, per_row: int, side: str, lengths: str) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, int64 [rows * per_row, longest]; padding on the right."""
    draw = torch.Generator().manual_seed(per_row)
    low, high = QUERY_TOKENS if side == "query" else PASSAGE_TOKENS
    sizes = torch.randint(low, high + 1, (rows * per_row,), generator=draw)
    if lengths == "equal":
        sizes = torch.full_like(sizes, EQUAL_QUERY_TOKENS if side == "query" else EQUAL_PASSAGE_TOKENS)
    mask = (torch.arange(int(sizes.max())) < sizes.unsqueeze(1)).long()
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=draw)
    return torch.where(mask.bool(), ids, PAD), mask


def write_model(folder: Path) -> None:
    """A random BERT as Hugging Face files, which both sides load."""
    from transformers import BertConfig, BertModel

    from tdro_hpc.encoders.tiny import tiny_tokenizer

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.05,  # 0.02 gives all texts nearly the same vector
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)


class _Ours:
    """This project's step, as training takes it."""

    def __init__(self, name: str, folder: Path) -> None:
        from tdro_hpc.config.schema import LoraConfig, ModelConfig, TrainingConfig
        from tdro_hpc.encoders.backbone import load_encoder
        from tdro_hpc.parallel.process import Process
        from tdro_hpc.parallel.torch_engine import TorchEngine

        attention = "sdpa" if name.endswith("padded") else "padding_free"
        config = ModelConfig(
            name=str(folder),
            pooling="mean",
            attention=attention,
            autocast="float32",
            gradient_checkpointing=False,
            lora=LoraConfig(enabled=False),
        )
        process = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
        self.cached = name.startswith("ours cached")
        self.model = load_encoder(config, device="cpu", seed=0)
        self.engine = TorchEngine(self.model, process, TrainingConfig())

    def step_on(self, parts: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        """Each row's positive and its negative are neighbours among the passages."""
        from tdro_hpc.data.tokens import Tokens
        from tdro_hpc.losses import grouped_infonce
        from tdro_hpc.losses.gradcache import cached_backward

        tokens = [Tokens(ids, mask) for ids, mask in parts]
        positives = torch.arange(len(tokens[0].input_ids)) * 2

        def loss_of(embeddings: list[Tensor]) -> Tensor:
            return grouped_infonce(*embeddings, positives, temperature=TEMPERATURE).mean()

        def plain() -> Tensor:
            loss = loss_of(self.engine.embed(tokens))
            self.engine.backward(loss, synchronise=True)
            return loss.detach()

        def cached() -> Tensor:
            return cached_backward(self.engine, tokens, CHUNK_TOKENS, loss_of, synchronise=True)

        return cached if self.cached else plain


class _SentenceTransformers:
    """Its loss on its model, as its trainer calls it."""

    def __init__(self, name: str, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses

        self.model = SentenceTransformer(str(folder), device="cpu").train()
        scale = 1 / TEMPERATURE
        if name == "ST plain":
            self.loss = losses.MultipleNegativesRankingLoss(self.model, scale=scale)
            return
        budget = {"mini_batch_num_tokens": CHUNK_TOKENS} if name.endswith("tokens") else {}
        self.loss = losses.CachedMultipleNegativesRankingLoss(
            self.model, scale=scale, mini_batch_size=MINI_BATCH_SIZE, **budget
        )

    def step_on(self, parts: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        """Queries, positives and negatives are columns of their own, each padded to its longest row."""
        (query_ids, query_mask), (ids, mask) = parts
        columns = [(query_ids, query_mask), (ids[::2], mask[::2]), (ids[1::2], mask[1::2])]
        widths = [int(column_mask.sum(dim=1).max()) for _, column_mask in columns]
        features = [
            {"input_ids": column[:, :width].contiguous(), "attention_mask": column_mask[:, :width].contiguous()}
            for (column, column_mask), width in zip(columns, widths, strict=True)
        ]

        def step() -> Tensor:
            loss = self.loss([dict(feature) for feature in features], None)
            loss.backward()
            return loss.detach()

        return step


def cached_step_table(session: Session) -> Report:
    """Steps on texts of mixed and of equal lengths."""
    labels = session.labels(tuple(NOTES))
    rows = session.options.B[0] if session.options.B else ROWS
    columns = ["lengths", "step", "time", "x ST cached", "x ours plain", "peak MB", "loss", "gradient norm", "same"]
    report = Report("A whole step: tokens to the gradients of all parameters", [*columns, "goal"])
    for lengths in ("mixed", "equal"):
        jobs = [
            Job(label, "infonce_lib.cached_step", "StepWorkload", {"name": label, "rows": rows, "lengths": lengths})
            for label in labels
        ]
        figures = session.rounds.measure(jobs)
        for label, figure in figures.items():
            session.keep("cached_step", lengths, label, figure)
            report.rows.append([lengths, label, *_step_cells(report, lengths, label, figures)])
    report.notes += [
        f"{rows} queries with a positive and a negative each. mixed: queries of 8 to 32 tokens, passages of 16 to 256;",
        "equal: 32 and 128, so that nobody computes padding. A random BERT of 6 layers and width 384, float32. Peak:",
        "memory beyond the gradients of the parameters. same: loss and gradient norm are those of the first step of",
        f"the table, within {SAME:g}. {STAR}",
        "",
        *(f"- {label}: {NOTES[label]}" for label in labels),
        "",
    ]
    return report


def _step_cells(report: Report, lengths: str, label: str, figures: dict[str, Figure]) -> list[str]:
    figure = figures[label]
    if figure.failed:
        return [figure.failed, *["-"] * 7]
    reference = next(each for each in figures.values() if not each.failed).first.figures
    said = figure.first.figures
    same = all(abs(said[name] - reference[name]) <= SAME * abs(reference[name]) for name in reference)
    goal = _step_goal(report, lengths, label, figures) if same else "-"
    return [
        seconds_cell(figure),
        ratio_cell(figure, figures.get("ST cached")),
        ratio_cell(figure, figures.get("ours plain")),
        megabytes(figure.first.workspace),
        f"{said['loss']:.5f}",
        f"{said['gradient norm']:.5f}",
        "yes" if same else "NO",
        goal,
    ]


def _step_goal(report: Report, lengths: str, label: str, figures: dict[str, Figure]) -> str:
    """At most 0.70 of ST's where lengths are mixed, 1.33 of the plain step where nothing is padding."""
    bottom, limit = ("ST cached", 0.70) if lengths == "mixed" else ("ours plain", 1.33)
    value = ratio(figures[label], figures.get(bottom)) if label == "ours cached" else None
    if value is None:
        return "-"
    return f"{value:.2f} <= {limit:.2f} x {bottom} {verdict(report, value, limit)}"
