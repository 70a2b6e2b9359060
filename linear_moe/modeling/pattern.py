"""Layer patterns: "LLLN * 3" -> one symbol for each layer -> one mixer and one channel mixer for each layer.

sum  := term ("+" term)*
term := atom ("*" integer)*
atom := letters | '"' letters '"' | "'" letters "'" | "(" sum ")" | "[" sum "]"
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.mixers.base import MixerConfig
from linear_moe.options.errors import ConfigError

PATH = "model.pattern"
EXAMPLE = "for example LLLN * 3"
MAX_LAYERS = 100_000  # bound of expanded patterns, so that "L * 10000000000" does not fill the memory
TOKEN = re.compile(
    r"""\s*(?:(?P<letters>[A-Za-z]+|"[A-Za-z]*"|'[A-Za-z]*')|(?P<count>\d{1,12})|(?P<sign>[*+()\[\]])|(?P<end>$))"""
)


@dataclass(frozen=True)
class ResolvedLayer:
    """One layer of the model: its symbol, token mixer and channel mixer ("moe" or "dense")."""

    symbol: str
    mixer: MixerConfig
    ffn: str


class _Parser:
    """Recursive-descent parser of `text`; the current token is `token`, of a `kind`, and begins at `start`."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self.advance()

    def advance(self) -> str:
        """Steps over the current token and returns it."""
        current = getattr(self, "token", "")
        match = TOKEN.match(self.text, self.position)
        self.start = len(self.text) - len(self.text[self.position :].lstrip())
        if match is None:
            raise self.error(f"unexpected {self.text[self.start]!r}")
        self.kind, self.token, self.position = str(match.lastgroup), match[str(match.lastgroup)], match.end()
        return current

    def error(self, problem: str) -> ConfigError:
        return ConfigError(PATH, self.text, f"{problem} at position {self.start + 1}", fix=EXAMPLE)

    def sum(self) -> str:
        total = self.term()
        while self.token == "+":
            self.advance()
            total += self.term()
        return total

    def term(self) -> str:
        symbols = self.atom()
        while self.token == "*":
            self.advance()
            if self.kind != "count" or int(self.token) == 0:
                raise self.error("expected a positive number")
            if len(symbols) * int(self.token) > MAX_LAYERS:
                raise self.error(f"more than {MAX_LAYERS} layers")
            symbols *= int(self.advance())
        return symbols

    def atom(self) -> str:
        if self.kind == "letters":
            return self.advance().strip("'\"")
        if self.token in ("(", "["):
            closing = {"(": ")", "[": "]"}[self.advance()]
            inner = self.sum()
            if self.token != closing:
                raise self.error(f"expected {closing!r}")
            self.advance()
            return inner
        raise self.error("expected letters or a bracket")


def parse_pattern(text: str) -> str:
    """Expands a pattern: `"LLLN * 3"` -> `"LLLNLLLNLLLN"`; bad syntax raises ConfigError with the position."""
    parser = _Parser(text)
    symbols = parser.sum()
    if parser.kind != "end":
        raise parser.error(f"unexpected {parser.token!r}; expected '*', '+' or the end")
    return symbols


def resolve_layers(model: ModelConfig) -> list[ResolvedLayer]:
    """Returns the model's layers in order; raises ConfigError for unknown symbols or a length other than num_layers."""
    symbols = parse_pattern(model.pattern)
    meaning = {"L": (model.mixer, model.ffn), "N": (model.attention, model.ffn)}
    for symbol, layer in model.symbols.items():
        if not re.fullmatch("[A-Za-z]", symbol):
            raise ConfigError(f"model.symbols.{symbol}", ..., "a symbol is one letter")
        mixer, ffn = meaning.get(symbol, meaning["L"])
        meaning[symbol] = (layer.mixer or mixer, layer.ffn or ffn)
    unknown = next((s for s in symbols if s not in meaning), None)
    if unknown:
        fix = f"define model.symbols.{unknown}, or use one of {', '.join(sorted(meaning))}"
        raise ConfigError(PATH, model.pattern, f"unknown symbol {unknown!r}", fix=fix)
    if len(symbols) != model.num_layers:
        fix = f"set model.num_layers={len(symbols)}, or write a pattern of {model.num_layers} symbols"
        constraint = f"stands for {len(symbols)} layers, but model.num_layers = {model.num_layers}"
        raise ConfigError(PATH, model.pattern, constraint, fix=fix)
    layers = [ResolvedLayer(s, *meaning[s]) for s in symbols]
    own = {symbol for symbol, layer in model.symbols.items() if layer.ffn is not None}
    return [
        layer if layer.symbol in own or _has_experts(model, i) else replace(layer, ffn="dense")
        for i, layer in enumerate(layers)
    ]


def _has_experts(model: ModelConfig, i: int) -> bool:
    """Whether first_dense_layers and layer_frequency let layer `i` be a mixture of experts."""
    beyond = i - model.moe.first_dense_layers
    return beyond >= 0 and beyond % model.moe.layer_frequency == 0


def mixer_path(model: ModelConfig, symbol: str) -> str:
    """Dotted config path of the mixer that `symbol` stands for."""
    if symbol in model.symbols and model.symbols[symbol].mixer is not None:
        return f"model.symbols.{symbol}.mixer"
    return "model.attention" if symbol == "N" else "model.mixer"
