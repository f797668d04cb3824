"""The section `label_curve`: how many labels are tried, how often, and with how much noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.choices import require


@dataclass(kw_only=True, slots=True)
class LabelCurveConfig:
    """Every arm that learns from labels, at several numbers of them; +exp=label_curve turns it on.

    A size counts labelled training items. Of one draw, smaller sets are parts of larger ones, and
    each label of the task comes before any comes twice. No point chooses on validation labels.
    """

    enabled: bool = False
    sizes: list[int] | None = None  # null: num_sizes of them, log-spaced up to the pool
    num_sizes: int = 4
    draws: int = 3  # sets drawn from the pool
    seeds: int = 1  # trainings on each set
    noise: list[float] = field(default_factory=lambda: [0.0])  # shares of labels that are flipped

    def __post_init__(self) -> None:
        """Counts, shares, and nothing twice."""
        for key in ("draws", "seeds"):
            value = getattr(self, key)
            require(value > 0, f"label_curve.{key}", value, "a positive count")
        require(
            self.num_sizes > 1, "label_curve.num_sizes", self.num_sizes, "2 or more, to be a curve"
        )
        sizes = self.sizes
        require(
            sizes is None or (len(sizes) > 1 and sizes == sorted({*sizes}) and sizes[0] >= 2),
            "label_curve.sizes",
            sizes,
            "two or more growing counts of at least 2, or null",
            "write label_curve.sizes=[8,32,128,512]",
        )
        noise = self.noise
        is_rising = bool(noise) and noise == sorted({*noise}) and 0 <= noise[0] <= noise[-1] < 1
        require(
            is_rising and noise[0] == 0,
            "label_curve.noise",
            noise,
            "growing shares in [0, 1) from 0 on",
            "write label_curve.noise=[0,0.1,0.2]",
        )
