"""Parameter shapes of well-known models, written out so that neither transformers nor torchvision is needed."""

from __future__ import annotations

import math
import re

Shape = tuple[int, ...]

SYNTHETIC_PARAMETERS = 45_000_000  # how many a bare "768x768" stands for: 76 such layers, a model of BERT's order


def bert(hidden: int, layers: int, vocabulary: int = 30_522, positions: int = 512) -> list[Shape]:
    """BERT without a task head: 109.5 M parameters in 199 tensors for (768, 12), 335.1 M in 391 for (1024, 24)."""
    norm = [(hidden,), (hidden,)]
    linear = [(hidden, hidden), (hidden,)]
    embeddings = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    layer = [*linear * 4, *norm, (4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,), *norm]
    return embeddings + layer * layers + linear


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50: 25.6 M parameters in 161 tensors."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its batch norm

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]


def parse(text: str) -> list[Shape]:
    """Shapes of a model by its name, or of COUNT equal tensors.

    Args:
        text: "bert-base", "bert-large", "resnet50", "many-small" (1000 tensors of 1000 elements), or "[COUNT*]AxBx...",
            such as "10*1000x1000"; without a count, as many as make 45 M parameters.

    Returns:
        One shape per tensor.

    Raises:
        SystemExit: no such name and not of that form.
    """
    named = {
        "bert-base": lambda: bert(768, 12),
        "bert-large": lambda: bert(1024, 24),
        "resnet50": resnet50,
        "many-small": lambda: [(1000,)] * 1000,
    }
    if text in named:
        return named[text]()
    match = re.fullmatch(r"(?:(\d+)\*)?(\d+(?:x\d+)*)", text)
    if not match:
        raise SystemExit(f"--shapes {text}: not one of {', '.join(named)}, nor [COUNT*]AxB such as 10*1000x1000")
    shape = tuple(int(size) for size in match[2].split("x"))
    return [shape] * (int(match[1]) if match[1] else max(1, SYNTHETIC_PARAMETERS // math.prod(shape)))
