"""A text classifier of spaCy, trained by its loop from a config, on texts that are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import spacy
from spacy.training import Example
from spacy.training.initialize import init_nlp
from spacy.training.loop import train_while_improving
from thinc.api import Config, fix_random_seed

CONFIG = """
[nlp]
lang = "en"
pipeline = ["textcat"]

[components]
[components.textcat]
factory = "textcat"

[components.textcat.model]
@architectures = "{architecture}"
{model}

[corpora]
[corpora.train]
@readers = "pyopt.texts.v1"
seed = {seed}
count = 600
[corpora.dev]
@readers = "pyopt.texts.v1"
seed = 1000
count = 300

[training]
seed = {seed}
train_corpus = "corpora.train"
dev_corpus = "corpora.dev"

[training.optimizer]
@optimizers = "{optimizer}"
L2 = 0.01
grad_clip = 1.0
use_averages = {averages}
[training.optimizer.learn_rate]
@schedules = "warmup_linear.v1"
initial_rate = 0.005
warmup_steps = 20
total_steps = 1000
"""
MODELS = {
    "bow": ("spacy.TextCatBOW.v3", "exclusive_classes = true\nngram_size = 1\nno_output_layer = false\nlength = 4096"),
    "cnn": (
        "spacy.TextCatReduce.v1",
        "exclusive_classes = true\nuse_reduce_first = false\nuse_reduce_last = false\nuse_reduce_max = false\n"
        'use_reduce_mean = true\n[components.textcat.model.tok2vec]\n@architectures = "spacy.HashEmbedCNN.v2"\n'
        "pretrained_vectors = null\nwidth = 96\ndepth = 4\nembed_size = 2000\nwindow_size = 1\n"
        "maxout_pieces = 3\nsubword_features = true",
    ),
}
WORDS = ["film", "plot", "cast", "scene", "music", "camera", "story", "ending", "dialogue", "pace", "the", "a", "was"]
SIDES = {True: ["good", "great", "warm", "clever", "moving"], False: ["bad", "poor", "dull", "silly", "boring"]}


def texts(seed: int, count: int) -> list[tuple[str, bool]]:
    """Reviews in words that are mostly of their side, one in six of the other."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        is_good = bool(rng.integers(2))
        opinions = [str(rng.choice(SIDES[is_good != (rng.random() < 1 / 6)])) for _ in range(3)]
        words = [*opinions, *map(str, rng.choice(WORDS, size=9))]
        rng.shuffle(words)
        found.append((" ".join(words), is_good))
    return found


@spacy.registry.readers("pyopt.texts.v1")
def reader(seed: int, count: int) -> Any:
    def read(nlp: Any) -> Any:
        for text, is_good in texts(seed, count):
            cats = {"GOOD": float(is_good), "BAD": float(not is_good)}
            yield Example.from_dict(nlp.make_doc(text), {"cats": cats})

    return read


def trained(
    optimizer: str,
    seed: int,
    steps: int,
    architecture: str = "bow",
    averages: bool = True,
    batch: int = 16,
    evaluations: int = 10,
    around: Callable[[Any], Any] = lambda optimizer: optimizer,
) -> tuple[Any, list[float]]:
    """The pipeline after so many steps, and its accuracy on other texts, so often along the way.

    around: makes what stands for the optimizer in the loop.
    """
    name, model = MODELS[architecture]
    text = CONFIG.format(architecture=name, model=model, seed=seed, optimizer=optimizer, averages=str(averages).lower())
    fix_random_seed(seed)
    filled = spacy.util.load_model_from_config(Config().from_str(text), auto_fill=True).config
    nlp = init_nlp(filled)
    config = nlp.config.interpolate()
    training = spacy.util.registry.resolve(config["training"], schema=spacy.schemas.ConfigSchemaTraining)
    corpora = spacy.util.registry.resolve(config["corpora"])
    examples = list(corpora["train"](nlp))
    dev = list(corpora["dev"](nlp))
    rng = np.random.default_rng(seed)

    def batches() -> Any:
        while True:
            yield 0, [examples[i] for i in rng.permutation(len(examples))[:batch]]

    def evaluate() -> tuple[float, dict[str, Any]]:
        right = sum((nlp(e.reference.text).cats["GOOD"] > 0.5) == bool(e.reference.cats["GOOD"]) for e in dev)
        return right / len(dev), {}

    scores = []
    loop = train_while_improving(
        nlp,
        around(training["optimizer"]),
        batches(),
        evaluate,
        dropout=0.1,
        eval_frequency=max(steps // evaluations, 1),
        accumulate_gradient=1,
        patience=0,
        max_steps=steps,
        exclude=[],
        annotating_components=[],
        before_update=None,
    )
    for _, info, is_best in loop:
        if is_best is not None:
            scores.append(info["score"])
    return nlp, scores
