"""The probability flow of a Dirac mixture over a codebook, in variables in which no term blows up.

Distilled Decoding (arXiv 2412.17153, Eq. 3) turns noise into a token by following, from t = 0 to 1,

    x_t = (1 - t) eps + t c,    dx/dt = (D(x, t) - x) / (1 - t),    D = E[c | x_t = x],

where eps ~ N(0, I) and c is codebook row j with probability p_j. Put z = x / (1 - t) and r = t / (1 - t), so that
z = eps + r c. Then dr = dt / (1 - t)^2 and

    dz/dr = (1 - t)^2 (dx/dt / (1 - t) + x / (1 - t)^2) = D - x + x = D,    z(0) = noise,

and given z the weight of row j is the Gaussian posterior, in which |z|^2 cancels:

    w_j ~ p_j exp(-|z - r c_j|^2 / 2) ~ exp(log p_j + r z.c_j - r^2 |c_j|^2 / 2),    D = sum_j w_j c_j.

As r grows one w_j wins: that j is the token, and x = z / (1 + r) tends to its code.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ddfast.errors import UserError


class Moments(NamedTuple):
    """What a distribution p looks like from afar; see ``CodebookFlow.moments``."""

    mean: Tensor  # [N, C]
    std: Tensor  # [N]
    entropy: Tensor  # [N]
    scale: Tensor  # [N]
    rest: Tensor  # [N], 1 - the largest p


class CodebookFlow:
    """The flow of N independent tokens.

    log_p: [N, V] log-probabilities up to a constant of each row (they are normalised here); -inf where p is zero. Every
        row needs a finite entry and none may be NaN or +inf: checked, UserError.
    codebook: [V, C], the same floating dtype and device, float32 or float64.

    Rows that repeat in the codebook share their weight in proportion to p and stay undecided for ever: the read-out
    then takes the more probable one.

    >>> flow = CodebookFlow(torch.randn(5, 64), torch.randn(64, 4))
    >>> mean, weights = flow.posterior(torch.randn(5, 4), 0.5)
    """

    def __init__(self, log_p: Tensor, codebook: Tensor) -> None:
        _check_arguments(log_p, codebook)
        top = log_p.amax(dim=1)
        if not bool(torch.isfinite(top).all()):
            row = int((~torch.isfinite(top)).nonzero()[0])
            raise UserError(
                f"row {row} of log_p has no finite maximum (NaN, +inf, or every token filtered out): check the "
                "teacher's logits for overflow, or compute them in a wider dtype"
            )
        half_square = 0.5 * codebook.square().sum(dim=1, keepdim=True)
        self.codebook = codebook
        self.log_p = log_p.log_softmax(dim=1)
        self._features_t = torch.cat([codebook, -half_square], dim=1).t()  # [C + 1, V]

    def __len__(self) -> int:
        return len(self.log_p)

    def rows(self, index: Tensor) -> CodebookFlow:
        """The flow of the tokens at ``index`` (int64 [M]) alone."""
        part = copy(self)
        part.log_p = self.log_p[index]
        return part

    def without(self, gone: Tensor) -> CodebookFlow:
        """The flow without the entries of the mask ``gone`` [N, V]. log_p keeps its constant."""
        rest = copy(self)
        rest.log_p = self.log_p.masked_fill(gone, -torch.inf)
        return rest

    def double(self) -> CodebookFlow:
        """The same flow in float64."""
        return (
            self if self.codebook.dtype == torch.float64 else CodebookFlow(self.log_p.double(), self.codebook.double())
        )

    def posterior(self, z: Tensor, r: Tensor | float) -> tuple[Tensor, Tensor]:
        """The field D [N, C] and the weights w [N, V] at z [N, C] and r >= 0 ([N] or one number).

        Both are finite as long as r^2 |c|^2 and r z.c are, so up to r of about 1e15 in float32. w is 0 wherever p is.
        """
        r = torch.as_tensor(r, dtype=z.dtype, device=z.device).expand(z.shape[0])[:, None]
        features = torch.cat([r * z, r * r], dim=1)
        weights = torch.addmm(self.log_p, features, self._features_t).softmax(dim=1)
        return weights @ self.codebook, weights

    def nearest(self, x: Tensor) -> Tensor:
        """The codebook row nearest to each x [N, C], by squared distance over all of V: int64 [N]; ties: the lowest."""
        features = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        return (features @ self._features_t).argmax(dim=1)

    def settle(self, z: Tensor, r: Tensor, weights: Tensor) -> Tensor:
        """The token (int64 [N]) that wins if only the two of largest weight [N, V] are left at z [N, C], r [N].

        Between two codes the flow is one-dimensional, so it keeps points in order: at every r those that will end at
        c_j are the p_j of the mixture p_i N(r c_i, I) + p_j N(r c_j, I) that lie furthest to j's side. Measured along
        c_i - c_j from the middle, let z be at q and the two centres at R and -R; then

            p_i Phi(q - R) + p_j Phi(q + R) > p_j,    that is    p_i Phi(q - R) > p_j Phi(-q - R),

        says that i wins. With two codes this is exact at any r, and at large r it takes the larger weight.
        """
        if self.codebook.shape[0] == 1:
            return torch.zeros_like(weights, dtype=torch.int64)[:, 0]
        pair = weights.topk(2, dim=1).indices  # [N, 2]
        prior = self.log_p.gather(1, pair).double()
        i, j = self.codebook[pair].double().unbind(dim=1)
        gap = (i - j).norm(dim=1)
        along = (i - j) / gap.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        q = ((z.double() - r.double()[:, None] * (i + j) / 2) * along).sum(dim=1)
        half = r.double() * gap / 2
        scores = prior + torch.special.log_ndtr(torch.stack([q - half, -q - half], dim=1))
        return pair.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]

    def moments(self) -> Moments:
        """Mean [N, C], per-channel std s [N], entropy H in nats [N] and natural scale R* [N] of the codes under p, and
        what the most probable token leaves to the others [N].

        R* solves C/2 log(1 + R*^2 s^2) = H: the r at which a Gaussian channel has told as much as there is to know.
        Most tokens are decided between R*/2 and 2 R*. Where only one code is possible any scale serves, and it is 1.

        The variance is taken about the most probable code, so that it keeps its digits when one token has almost all
        of the mass.
        """
        p = self.log_p.softmax(dim=1)  # exp(log_p); softmax is the faster of the two where many entries are -inf
        entropy = -(p * self.log_p.clamp_min(torch.finfo(p.dtype).min)).sum(dim=1)  # the clamp makes 0 log 0 = 0
        top = self.log_p.argmax(dim=1)
        centre = self.codebook[top]
        p.scatter_(1, top[:, None], 0.0)
        sums = p @ torch.cat([self._features_t.t(), torch.ones_like(self.codebook[:, :1])], dim=1)  # [N, C + 2]
        first, half_second, rest = sums[:, :-2], -sums[:, -2], sums[:, -1:]
        shift = first - rest * centre
        second = 2 * half_second - ((first + shift) * centre).sum(dim=1)
        variance = (second - shift.square().sum(dim=1)).clamp_min(0) / centre.shape[1]
        std = variance.sqrt()
        radius = torch.expm1(2 * entropy / centre.shape[1]).clamp_min(0).sqrt()
        known = (std > 0) & (radius > 0)
        scale = torch.where(known, radius / std.where(known, torch.ones_like(std)), torch.ones_like(std))
        return Moments(centre + shift, std, entropy, scale, rest[:, 0])


def _check_arguments(log_p: Tensor, codebook: Tensor) -> None:
    """Shapes, dtypes and devices of a flow."""
    if log_p.ndim != 2 or codebook.ndim != 2 or log_p.shape[1] != codebook.shape[0]:
        raise UserError(
            f"log_p must be [N, V] and codebook [V, C], not {tuple(log_p.shape)} and {tuple(codebook.shape)}: "
            "flatten batch dimensions and use the codebook of the same teacher"
        )
    if log_p.dtype not in (torch.float32, torch.float64) or codebook.dtype != log_p.dtype:
        raise UserError(f"log_p and codebook must both be float32 or float64, not {log_p.dtype} and {codebook.dtype}")
    if log_p.device != codebook.device:
        raise UserError(f"log_p is on {log_p.device} but codebook on {codebook.device}: move one of them")
