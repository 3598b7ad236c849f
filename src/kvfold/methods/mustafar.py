"""Mustafar: of each key and value the largest numbers, the newest tokens whole (arXiv:2505.22913)."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.formats import Format, Sparse
from kvfold.methods.base import Method, method


@method(
    "mustafar", title="Mustafar: unstructured sparsity of keys and values", paper="2505.22913", kind="sparse",
    formula=r"""
        \hat x_d = x_d \cdot [d \in \mathrm{top}_{D - k + 1}(|x|)], \quad k = \max(1, \lfloor \sigma D \rfloor)
    """,
    options={
        "key_sparsity": "share of a key's numbers that go (sigma), after RoPE; 0 to 0.99",
        "value_sparsity": "share of a value's numbers that go (sigma); 0 to 0.99",
        "residual": "newest tokens that stay whole, at least",
        "group": "tokens that leave this window together",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Mustafar(Method):
    """Keeps every token: of its key and its value the numbers of the largest magnitude, and a bitmap of their channels.

    A token is pruned once, when `residual` newer tokens stand behind it (and up to `group` - 1 more), whether they came
    one by one or at once. A prompt is attended in full before it is stored; later tokens read what is left as it lies.
    D numbers cost (D - k + 1) of the model's and D / 8 bytes. Behind any method that drops or merges it says how the
    rest is held: "h2o(budget=0.25) | mustafar".
    As published, one number more stays than the sparsity says: those not below the k-th smallest magnitude.
    Differs from the paper: of equal magnitudes the earlier channels stay, so that all tokens take the same bytes (there
    all of them stay, and sizes are counted); a token is a record of its own in place of tiles of 64 tokens or channels
    with padding and offsets; 16 tokens are pruned together (there 256, or one by one where nothing is saved).
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    residual: int = 32
    group: int = 16

    def __post_init__(self) -> None:
        self.format  # noqa: B018  (raises for options that can't be)

    @cached_property
    def format(self) -> Format:  # type: ignore[override]
        """Pruned tokens, and the window."""
        return Sparse(self.key_sparsity, self.value_sparsity, self.residual, self.group)
