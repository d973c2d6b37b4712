"""The reference semantics in float64 NumPy: literal loops, no cleverness.

Written from the description of the reference system, block by block and step by step,
in the vocabulary of the golden cases. Slow on purpose; an oracle for `tests/parity.py`.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

Array = np.ndarray


def run(case: dict, init: dict[str, Array], grads: dict[str, Array]) -> dict:
    """Parameters after every step: ``{name: [steps, ...]}``."""
    config = case["optimizer"]
    history: dict[str, list[Array]] = {}
    for name, start in init.items():
        param = np.array(start, np.float64)
        dims = merge_dims(param.shape, config)
        where = block_slices(dims, config)
        blocks = [Block(config, case["peak_lr"], param.reshape(dims)[w]) for w in where]
        history[name] = []
        for t, grad in enumerate(grads[name], start=1):
            new = param.reshape(dims).copy()
            for block, w in zip(blocks, where, strict=True):
                new[w] = block.step(t, new[w], np.asarray(grad).reshape(dims)[w])
            param = new.reshape(param.shape)
            history[name].append(param)
    return {name: np.stack(steps) for name, steps in history.items()}


def _inf(value: object) -> float:
    return math.inf if value == "inf" else float(value)


def merge_dims(shape: tuple[int, ...], config: dict) -> tuple[int, ...]:
    target = _inf(config.get("target_parameter_dimensionality", 1))
    if config.get("preconditioner", {}).get("type") == "spectral_descent":
        target = 2.0
    threshold = _inf(config.get("max_preconditioner_dim", 1024))
    if math.isinf(target):
        return tuple(shape) or (1,)
    left = [d for d in shape if d != 1] or [1]
    merged = [left.pop()]
    while left:
        d = left.pop()
        if len(merged) + len(left) + 1 > target and merged[0] * d <= threshold:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return tuple(merged)


def block_slices(dims: tuple[int, ...], config: dict) -> list[tuple[slice, ...]]:
    size = _inf(config.get("max_preconditioner_dim", 1024))
    sides = []
    for d in dims:
        step = d if size >= d else int(size)
        sides.append([slice(a, min(a + step, d)) for a in range(0, d, step)])
    return list(itertools.product(*sides))


class Block:
    """One block: all of its state, and one step."""

    def __init__(self, config: dict, peak: float, param: Array) -> None:
        self.config, self.peak, self.shape = config, peak, param.shape
        self.preconditioner = config.get("preconditioner", {})
        self.b1, self.b2 = config.get("betas", (0.9, 1.0))
        b3 = config.get("beta3", -1)
        self.b3 = self.b1 if b3 in (-1, None) else b3
        self.exponents = self._exponents()
        self.factors = {k: np.zeros((self.shape[k],) * 2) for k in self.exponents}
        self.roots = {k: np.eye(self.shape[k]) for k in self.exponents}
        self.mu = np.zeros(self.shape)
        self.nu = np.zeros(self.shape)
        self.momentum = np.zeros(self.shape)
        self.z = np.array(param)
        self.rate_sum = 0.0
        self.bases = {k: np.eye(self.shape[k]) for k in range(len(self.shape))}
        self.second = np.zeros(self.shape)
        self.frequency = config.get("precondition_frequency", 1)
        start = config.get("start_preconditioning_step", -1)
        self.kind = self.preconditioner.get("type", "root_inv")
        if self.kind in ("spectral_descent", "sign_descent"):
            self.frequency = 1
        self.start = self.frequency if start == -1 else start

    def _exponents(self) -> dict[int, float]:
        order = len(self.shape)
        if self.preconditioner.get("type") == "eigenvalue_corrected":
            ignored = self.preconditioner.get("ignored_basis_change_dims", {})
            ignored = ignored.get(str(order), ())
            return {k: 1.0 for k in range(order) if k not in ignored}
        override = self.preconditioner.get("inverse_exponent_override", {})
        override = override.get(str(order), override.get(order, {}))
        found = {}
        for k in range(order):
            e = 1 / (2 * order)
            if isinstance(override, dict):
                e = override.get(str(k), override.get(k, e))
            else:
                e = override
            if e != 0:
                found[k] = e
        return found

    def step(self, t: int, w: Array, g: Array) -> Array:
        config = self.config
        lr = config["lr"][t - 1]
        decay = config.get("weight_decay", 0.0)
        kind = config.get("weight_decay_type", "decoupled")
        if kind == "l2":
            g = g + decay * w
        if self.kind not in ("spectral_descent", "sign_descent"):
            self._measure(g)
            if (t % self.frequency == 0 and t > self.start) or t == self.start:
                self._refresh(t)
        self._graft_state(g)
        if self.kind == "eigenvalue_corrected":
            turned = self._turn(g, back=False)
            self.second = self.b2 * self.second + self._weight() * turned * turned
        f = self._filter(t, g)
        u = self._direction(t, f)
        alpha = {
            "l2": 0.0,
            "decoupled": decay,
            "corrected": decay * lr / self.peak,
            "independent": decay / self.peak,
        }[kind]
        averaging = config.get("iterate_averaging") or {"type": "classic_momentum"}
        if averaging["type"] != "classic_momentum":
            return self._primal(averaging, w, u, lr, alpha)
        return w - lr * self._average(u + alpha * w)

    def _weight(self) -> float:
        dropped = self.preconditioner.get("drop_weighting_factor_on_gsquare", False)
        return 1.0 if self.b2 == 1 or dropped else 1 - self.b2

    def _correction(self, t: int) -> float:
        dropped = self.preconditioner.get("drop_weighting_factor_on_gsquare", False)
        correct = self.config.get("use_bias_correction", True) and not dropped
        return 1 - self.b2**t if correct and self.b2 < 1 else 1.0

    def _measure(self, g: Array) -> None:
        new = {}
        for k in self.factors:
            seen = g
            if self.kind.endswith("_kl"):
                for other, root in self.roots.items():
                    if other != k:
                        seen = multiply(root, seen, other)
            unfolded = np.moveaxis(seen, k, 0).reshape(g.shape[k], -1)
            sample = self._weight() * unfolded @ unfolded.T
            new[k] = self.b2 * self.factors[k] + sample
        self.factors = new

    def _refresh(self, t: int) -> None:
        function = self.preconditioner.get("matrix_function", {"type": "eigh_root"})
        eps = self.config.get("epsilon", 1e-12)
        for k, e in self.exponents.items():
            target = self.factors[k] / self._correction(t)
            if self.preconditioner.get("use_trace_scaling", False):
                power = self.preconditioner.get("trace_scaling_exponent", 0.5)
                target = target * max(np.trace(target), eps) ** -power
            if self.kind == "eigenvalue_corrected":
                _, self.bases[k] = basis(target, self.bases[k], eps, function)
            elif function["type"] == "qr" or (
                function.get("tolerance") and (function["type"] == "eigh")
            ):
                values, self.bases[k] = basis(target, self.bases[k], eps, function)
                if values.min() < eps:
                    values = values - values.min() + eps
                self.roots[k] = self.bases[k] * values**-e @ self.bases[k].T
            else:
                new = inverse_root(target, e, eps, function)
                if new is not None:
                    self.roots[k] = new

    def _turn(self, x: Array, *, back: bool) -> Array:
        for k in self.exponents:
            x = multiply(self.bases[k] if back else self.bases[k].T, x, k)
        return x

    def _graft_state(self, g: Array) -> None:
        graft = self.config.get("grafting")
        if graft is None or graft["type"] == "sgd":
            return
        b2 = 1.0 if graft["type"] == "adagrad" else self._graft_b2()
        dropped = graft.get("drop_weighting_factor_on_gsquare", False)
        weight = 1.0 if dropped or b2 == 1 else 1 - b2
        self.nu = b2 * self.nu + weight * g * g

    def _graft_b2(self) -> float:
        graft = self.config["grafting"]
        return graft.get("beta2", 0.999 if graft["type"] == "adam" else 0.99)

    def _graft_direction(self, t: int, f: Array) -> Array:
        graft = self.config["grafting"]
        if graft["type"] == "sgd":
            return f
        nu = self.nu
        dropped = graft.get("drop_weighting_factor_on_gsquare", False)
        if graft["type"] == "adam" and not dropped and self._graft_b2() < 1:
            nu = nu / (1 - self._graft_b2() ** t)
        default = 1e-10 if graft["type"] == "adagrad" else 1e-8
        return f / (np.sqrt(nu) + graft.get("epsilon", default))

    def _filter(self, t: int, g: Array) -> Array:
        if self.b1 == 0:
            return g
        f = self.b3 * self.mu + (1 - self.b3) * g
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        if self.config.get("use_bias_correction", True):
            f = f / (1 - self.b3 * self.b1 ** (t - 1))
        return f

    def _direction(self, t: int, f: Array) -> Array:
        graft = self.config.get("grafting")
        if graft is not None and t < self.start:
            return self._graft_direction(t, f)
        u = self._preconditioned(t, f)
        if graft is not None:
            target = np.linalg.norm(self._graft_direction(t, f))
            u = u * (target / (np.linalg.norm(u) + 1e-16))
        return u

    def _preconditioned(self, t: int, f: Array) -> Array:
        if self.kind == "sign_descent":
            return np.sign(f)
        if self.kind == "spectral_descent":
            return orthogonal(f, self.preconditioner.get("orthogonalization", {}))
        if self.kind == "eigenvalue_corrected":
            override = self.preconditioner.get("inverse_exponent_override", {})
            power = override.get(str(f.ndim), override.get(f.ndim, 0.5))
            eps = self.config.get("epsilon", 1e-12)
            scale = (self.second / self._correction(t)) ** power + eps
            return self._turn(self._turn(f, back=False) / scale, back=True)
        for k, root in self.roots.items():
            f = multiply(root, f, k)
        return f

    def _primal(
        self, averaging: dict, y: Array, u: Array, lr: float, alpha: float
    ) -> Array:
        mu_y = averaging.get("train_interp_coeff", 0.8)
        mu_x = averaging.get("eval_interp_coeff", 0.9)
        if averaging["type"] == "schedule_free":
            weight = lr ** averaging.get("eval_coeff_lr_power", 2.0)
            self.rate_sum += weight
            mu_x = 1 - weight / self.rate_sum
        z = self.z * (1 - lr * alpha)
        self.z = z - lr * u
        return y + (1 - mu_x) * (z - y) - (1 - mu_x * mu_y) * lr * u

    def _average(self, u: Array) -> Array:
        averaging = self.config.get("iterate_averaging")
        if averaging is None:
            return u
        mu = averaging.get("momentum", 0.9)
        damped = (1 - averaging.get("dampening", 0.0)) * u
        self.momentum = mu * self.momentum + damped
        if averaging.get("use_nesterov", False):
            return damped + mu * self.momentum
        return self.momentum


def multiply(matrix: Array, x: Array, k: int) -> Array:
    """``matrix`` times dimension ``k`` of ``x``."""
    return np.moveaxis(np.tensordot(matrix, x, (1, k)), 0, k)


def basis(a: Array, q: Array, eps: float, function: dict) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of ``a + eps I``, exact or one step nearer."""
    a = a + eps * np.eye(len(a))
    b = q.T @ a @ q
    off = np.linalg.norm(b - np.diag(np.diag(b)))
    tolerance = function.get("tolerance", 0.0)
    if function["type"] != "qr":
        if tolerance and off <= tolerance * np.linalg.norm(b):
            return np.diag(b), q
        return np.linalg.eigh(a)
    for _ in range(function.get("max_iterations", 1)):
        off = np.linalg.norm(b - np.diag(np.diag(b)))
        if off <= tolerance * np.linalg.norm(b):
            break
        s, r = np.linalg.qr(b)
        b, q = r @ s, q @ s
    order = np.argsort(np.diag(b), kind="stable")
    return np.diag(b)[order], q[:, order]


def orthogonal(f: Array, given: dict) -> Array:
    rows, columns = f.shape
    scale = 1.0
    if given.get("scale_by_dims", "one") == "sqrt_max1_rows_over_cols":
        scale = math.sqrt(max(1, rows / columns))
    if given.get("type") == "svd":
        u, s, vt = np.linalg.svd(f, full_matrices=False)
        return scale * (s.sum() if given.get("scale_by_nuclear_norm") else 1) * u @ vt
    x = f / max(np.linalg.norm(f), 1e-8)
    x = x if rows >= columns else x.T
    a, b, c = given.get("coefficients", (3.4445, -4.775, 2.0315))
    for _ in range(given.get("num_iterations", 5)):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return scale * (x if rows >= columns else x.T)


def inverse_root(a: Array, e: float, eps: float, function: dict) -> Array | None:
    """One root; None where the reference system keeps the old one."""
    if function["type"] == "coupled_newton":
        return _newton(a, e, eps, function)
    if function["type"] == "coupled_higher_order":
        return _higher_order(a, e, function)
    stability = function.get("rank_deficient_stability") or {}
    if stability.get("type") == "pseudo_inverse":
        w, v = np.linalg.eigh(a)
        rtol = stability.get("rank_rtol", 0.0)
        rtol = len(w) * np.finfo(np.float64).eps if rtol is None else rtol
        cut = max(stability.get("rank_atol", 0.0), rtol * max(w.max(), 0))
        powers = np.array([x**-e if x > cut else 0.0 for x in w])
        return v * powers @ v.T
    w, v = np.linalg.eigh(a + eps * np.eye(len(a)))
    if w.min() < eps:
        w = w - w.min() + eps
    return v * w**-e @ v.T


def _newton(a: Array, e: float, eps: float, function: dict) -> Array:
    p = round(1 / e)
    eye = np.eye(len(a))
    a = a + eps * eye
    z = (p + 1) / (2 * np.linalg.norm(a))
    x, m = z ** (1 / p) * eye, z * a
    for _ in range(function.get("max_iterations", 100)):
        if np.abs(m - eye).max() <= function.get("tolerance", 1e-6):
            break
        t = (1 + 1 / p) * eye - m / p
        x, m = x @ t, np.linalg.matrix_power(t, p) @ m
    return x


def _higher_order(a: Array, e: float, function: dict) -> Array | None:
    root = Fraction(1 / e).limit_denominator(64)
    p, q, order = root.numerator, root.denominator, function.get("order", 3)
    eye = np.eye(len(a))
    ridge = function.get("rel_epsilon", 0.0) * np.linalg.norm(a, np.inf)
    a = a + max(ridge, function.get("abs_epsilon", 0.0)) * eye
    z = 1 / np.trace(a)
    x, m = z ** (1 / p) * eye, z * a
    t = (1 + 1 / p) * eye - m / p
    x, m = x @ t, np.linalg.matrix_power(t, p) @ m
    error = np.abs(m - eye).max()
    for _ in range(function.get("max_iterations", 100) - 1):
        if error <= function.get("tolerance", 1e-8):
            break
        b, t, c, term = eye - m, np.zeros_like(a), 1.0, eye
        for i in range(order):
            t = t + c * term
            c, term = c * (1 + i * p) / ((i + 1) * p), term @ b
        x, m = x @ t, np.linalg.matrix_power(t, p) @ m
        new = np.abs(m - eye).max()
        if new > 1.2 * error or (new == error and error < 1e-3):
            break
        error = new
    if np.abs(a @ np.linalg.matrix_power(x, p) - eye).max() > 0.1:
        return None
    return np.linalg.matrix_power(x, q)
