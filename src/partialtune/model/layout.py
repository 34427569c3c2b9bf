"""Where the parts of a causal language model are: nn.Module -> the block and the component of every parameter name.

Read from the module tree alone:

1. the decoder blocks are the elements of one `nn.ModuleList`: the one with the most parameters;
2. the trunk is the smallest module that holds both these blocks and the token embeddings; position embeddings and
   the final norm are in it, beside the blocks;
3. the head is what the model has around its body: the output embeddings and what comes with them;
4. inside a block the outermost module that says what it is (attention, mlp, mixer) names the component of all that
   it holds, except that a norm is a norm wherever it stands;
5. what branches off beside blocks and token embeddings, and says that it sees (vision, image) or that it joins the two
   (projector, merger), is a vision tower or a projector; then the trunk and the head are the language model.

There is no table of model names here. Implementations name their classes for what they do (`GPT2Attention`,
`MixtralSparseMoeBlock`, `JambaMambaMixer`); where a class is only a container or a matrix (`ModuleList`, `Sequential`,
`Linear`), the attribute that holds it says it (`self_attn`, `ffn`, `fc1`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType

from torch import nn

from partialtune.errors import ModelError

COMPONENTS = (
    "embeddings.tokens",
    "embeddings.positions",
    "embeddings.other",
    "attention",
    "mlp",
    "mixer",
    "norms",
    "final_norm",
    "head",
    "other",
)
# The last word counts: in Qwen3MoeAttention, RecurrentGemmaMlp and xLSTMFeedForward an earlier one is the model's name.
CLASS_WORDS = re.compile(
    r"(?P<attention>Attention|Attn)"
    r"|(?P<mixer>Mamba|Mixer|SSM|Delta|ShortConv|Recurrent|LSTM)"
    r"|(?P<mlp>MLP|Mlp|MoE|Moe|FeedForward|FFN|Experts?|Router)"
    r"|(?P<neither>Norm|DecoderLayer|Residual)"
)
ATTRIBUTES = {
    "attention": re.compile(r"(self_|cross_)?(attn|attention)"),
    "mixer": re.compile(r"mixer|mamba|ssm"),
    "mlp": re.compile(r"mlps?|ffn|feed_forward|fc_?(\d|in|out)|intermediate|output|experts|router"),
}
# Of a mixture of experts, within an mlp. A shared expert is an mlp that every token passes: it is neither of the two.
EXPERTS = re.compile(r"Experts$")
ROUTER = re.compile(r"(?:Router|Gating|Gate)$")
ROUTERS_OWN_BIAS = re.compile(r"expert_bias|e_score_correction_bias")  # beside the router, added to what it scores
# Beside a language model, by class or attribute. What joins also sees, in many names: it is asked first.
JOINS = re.compile(r"[Pp]rojector|[Mm]erger|[Cc]onnector|[Aa]ligner|[Rr]esampler|[Qq]_?[Ff]ormer|Multi[Mm]odal")
PROJECTS = re.compile(r"(?:^|_)(?:proj|projection)(?:_|$)|Projection$")
SEES = re.compile(r"(?:^|_)(?:vision|visual|image|video|pixel)(?:_|$)|Vision|Visual|Image|Video")
HEARS = re.compile(r"(?:^|_)(?:audio|speech|sound)(?:_|$)|Audio|Speech|Sound")


@dataclass(frozen=True)
class Place:
    """Where one name of a parameter stands in the model. A tied parameter has several names, so several places."""

    name: str
    block: int | None  # None outside the blocks
    component: str  # one of COMPONENTS
    tower: str = ""  # "vision", "projector" or "language" in a model of several towers; "" elsewhere
    mixture: str = ""  # "router" or "experts" inside the mlp of a mixture of experts; "" elsewhere

    @property
    def is_bias(self) -> bool:
        """Whether it is added and not multiplied, by its name: `c_fc.bias`, GPT-OSS's `gate_up_proj_bias`."""
        return self.name.endswith((".bias", "_bias"))


class Layout:
    """The paths of a model's parts, and from them the place of every parameter name. The path "" is the model itself.

    Raises:
        ModelError: If the model has no token embeddings or no list of blocks.
    """

    def __init__(self, model: nn.Module):
        # With duplicates: a module that stands at two paths (a shared layer, a tied head) answers to both.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tokens = self._find_tokens(model)
        lists = self._lists_of_blocks()
        self.blocks = self._choose_blocks(lists, type(model).__name__)
        self.block_count = len(self.modules[self.blocks])
        self.trunk = _common_parent(self.tokens, self.blocks)
        # Around other lists of blocks: image and audio encoders, a second stack. What belongs to them is `other`.
        others = [path for path in lists if not _within(path, self.blocks)]
        self.towers = [_child_towards(path, _common_parent(path, self.blocks)) for path in others]
        self.final_norm = self._find_final_norm()
        self.head = self._path_returned_by(model, "get_output_embeddings")
        self.whole, self.body = self._find_body()
        self._lists = lists
        self._beside: dict[str, str] = {}  # branch -> tower, see `_tower_beside`
        branches = {self._branch(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        # What projects alone makes no towers: Gemma 4's draft model has a projection before it, and one behind it.
        self.has_towers = any(self._says(SEES, path) or self._says(HEARS, path) for path in branches)

    def place(self, name: str) -> Place:
        """The block, the component and the tower of one full parameter name."""
        # By whole parts of the dotted name, never by a bare prefix: "h.1" begins "h.10.attn", too.
        if not _within(name, self.blocks):
            tower = self._tower_beside(name)
            component = "other" if tower else self._component_outside_blocks(name)
            if self.has_towers and not tower and (component == "head" or _within(name, self.trunk)):
                tower = "language"
            return Place(name, None, component, tower)
        index = name.removeprefix(f"{self.blocks}.").partition(".")[0]
        block = f"{self.blocks}.{index}"
        component = self._component_in_block(block, name)
        mixture = self._part_of_mixture(block, name) if component == "mlp" else ""
        return Place(name, int(index), component, "language" if self.has_towers else "", mixture)

    def _part_of_mixture(self, block: str, name: str) -> str:
        """Whether a parameter of an mlp belongs to the experts among which a router chooses, to the router, or to none.

        A shared expert is an mlp that every token passes, and its gate (Qwen2-MoE) chooses nothing: neither of the two.
        """
        owner, _, own_name = name.rpartition(".")
        path = block
        while path != owner:
            parent, path = path, _child_towards(name, path)
            attribute, kind = path.rpartition(".")[2], type(self.modules[path]).__name__
            if attribute.startswith("shared"):
                return ""
            if attribute == "experts" or EXPERTS.search(kind):
                return "experts"
            is_gate = attribute == "gate" and f"{parent}.experts" in self.modules  # a bare nn.Linear
            if attribute == "router" or is_gate or ROUTER.search(kind):
                return "router"
        return "router" if ROUTERS_OWN_BIAS.fullmatch(own_name) else ""

    def _branch(self, name: str) -> str:
        """The outermost module, or the parameter itself, that a name lies in beside blocks and token embeddings."""
        path, inner = "", (self.blocks, self.tokens)
        while path not in (*inner, name) and any(_within(one, path) for one in inner):
            path = _child_towards(name, path)
        return path

    def _tower_beside(self, name: str) -> str:
        """The tower "vision" or "projector" for what stands beside the language model, "" for all else."""
        if not self.has_towers:
            return ""
        branch = self._branch(name)
        if branch not in self._beside:
            self._beside[branch] = self._tower_of_branch(branch)
        if self._beside[branch] == "vision":  # Qwen2.5-VL has its merger in the vision tower, beside the blocks there
            child = _child_towards(name, branch)
            if child in self.modules and self._says(JOINS, child):
                return "projector"
        return self._beside[branch]

    def _tower_of_branch(self, path: str) -> str:
        module = self.modules.get(
            path
        )  # None for a parameter that stands by itself, such as LLaVA-NeXT's image_newline
        if path in (self.blocks, self.tokens, self.head) or self._says(HEARS, path):
            return ""
        outside = not _within(path, self.trunk)
        sees = self._says(SEES, path) or (outside and getattr(module, "main_input_name", "") == "pixel_values")
        if self._says(JOINS, path) or ((outside or sees) and self._says(PROJECTS, path)):
            return "projector"
        if not sees:
            return ""
        has_blocks = any(_within(blocks, path) for blocks in self._lists)
        # Fuyu's vision_embed_tokens, Gemma 4's embed_vision
        is_matrix = isinstance(module, nn.Linear | NoneType) or says_embedding(path.rpartition(".")[2])
        return "projector" if is_matrix and not has_blocks else "vision"

    def _says(self, words: re.Pattern, path: str) -> bool:
        """Whether the attribute that holds a module says one of these words, or the class of the module.

        In the trunk the class says nothing: Granite4VisionTextRMSNorm is a norm of the language model.
        """
        module = self.modules.get(path)
        in_class = module is not None and not _within(path, self.trunk)
        return any(map(words.search, [path.rpartition(".")[2], *([type(module).__name__] if in_class else [])]))

    def _component_in_block(self, block: str, name: str) -> str:
        owner = name.rpartition(".")[0]
        if is_norm(self.modules[owner]):  # before its place is asked: Qwen3's q_norm lies inside attention
            return "norms"
        path = block
        while path != owner:
            path = _child_towards(name, path)
            role = role_in_block(path.rpartition(".")[2], self.modules[path])
            if role:
                return role
        return "other"

    def _component_outside_blocks(self, name: str) -> str:
        owner = self.modules[name.rpartition(".")[0]]
        inner = name.removeprefix(f"{self.trunk}.")
        # In this order: the head before the token embedding, since a head may say `embed_out`; and the embedding by
        # which module it is before its name is asked, since names that speak of embeddings are many.
        if self.final_norm and _within(name, self.final_norm):
            return "final_norm"
        if self._is_head(name):
            return "head"
        if not is_norm(owner) and (owner is self.modules[self.tokens] or _within(name, self.tokens)):
            return "embeddings.tokens"
        if not _within(name, self.trunk) or any(_within(name, tower) for tower in self.towers):
            return "other"
        if says_position(inner) or says_position(type(owner).__name__):
            return "embeddings.positions"
        if is_norm(owner) or isinstance(owner, nn.Embedding) or says_embedding(inner) or self._widens_tokens(owner):
            return "embeddings.other"
        return "other"

    def _is_head(self, name: str) -> bool:
        if self.head is None:
            return False
        return self._is_beside_body(name) or _within(name, self.head) or self._narrows_to_tokens(name)

    def _is_beside_body(self, name: str) -> bool:
        """Whether it stands around the body, as the transform before BERT's head does."""
        if self.whole is None or self.body is None:
            return False
        return _within(name, self.whole) and not _within(name, self.body)

    def _token_width(self) -> int:
        return next(self.modules[self.tokens].parameters()).shape[-1]

    def _widens_tokens(self, owner: nn.Module) -> bool:
        """OPT's project_in: a matrix from the token embeddings' width to the blocks'."""
        return isinstance(owner, nn.Linear) and owner.in_features == self._token_width() != owner.out_features

    def _narrows_to_tokens(self, name: str) -> bool:
        """OPT's project_out: a matrix beside the blocks, from their width to that of token embeddings and head."""
        path = name.rpartition(".")[0]
        owner = self.modules[path]
        if not isinstance(owner, nn.Linear) or not _within(path, self.trunk) or not self._is_beside_blocks(path):
            return False
        return owner.out_features == self._token_width() != owner.in_features

    def _find_tokens(self, model: nn.Module) -> str:
        path = self._path_returned_by(model, "get_input_embeddings")
        if path is None or not holds_parameters([self.modules[path]]):
            raise ModelError(
                f"{type(model).__name__} has no token embeddings: get_input_embeddings() gives none of its modules. "
                f"Pass the model that AutoModelForCausalLM loads, without a DataParallel, DDP or FSDP wrapper."
            )
        return path

    def _path_returned_by(self, model: nn.Module, method: str) -> str | None:
        try:
            module = getattr(model, method, lambda: None)()  # a plain nn.Module has no such method
        except NotImplementedError:  # transformers' own word for "this architecture does not say"
            return None
        return next((path for path, other in self.modules.items() if other is module), None)

    def _lists_of_blocks(self) -> list[str]:
        """Paths of the lists whose elements are built of modules with parameters: blocks, experts, but no matrices."""
        lists = {path: module for path, module in self.modules.items() if isinstance(module, nn.ModuleList)}
        return [path for path, elements in lists.items() if any(holds_parameters(e.children()) for e in elements)]

    def _choose_blocks(self, lists: list[str], model_class: str) -> str:
        decoders = [path for path in lists if not self._reads_other_than_text(path)]
        if not decoders:
            raise ModelError(
                f"{model_class} has no decoder blocks that can be found: none of its modules is an nn.ModuleList of "
                f"blocks. Causal language models that keep their blocks in such a list are supported."
            )
        # A list inside an element of another, as experts in a block, never holds more; of equals the outer comes first.
        return max(decoders, key=lambda path: sum(p.numel() for p in self.modules[path].parameters()))

    def _reads_other_than_text(self, path: str) -> bool:
        """Whether a module around this one takes pixels or sound, as transformers' encoders declare, or says so."""
        around = [outer for outer in self.modules if _within(path, outer) and not _within(self.tokens, outer)]
        declared = [getattr(self.modules[outer], "main_input_name", "input_ids") != "input_ids" for outer in around]
        words = [word for outer in around for word in (outer.rpartition(".")[2], type(self.modules[outer]).__name__)]
        return any(declared) or any(said.search(word) for said in (SEES, HEARS, JOINS) for word in words)

    def _find_final_norm(self) -> str | None:
        """Among the norms beside the blocks: the one named as final, or else the first that is registered after them.

        OPT registers its final norm before the blocks; BART registers one for its embeddings after them, and LFM2's
        final one is called embedding_norm.
        """
        order = list(self.modules)
        beside = [path for path in order if self._is_beside_blocks(path) and is_norm(self.modules[path])]
        names = {path: path.rpartition(".")[2] for path in beside if holds_parameters([self.modules[path]])}
        own = [path for path, name in names.items() if name == "embedding_norm" or not says_embedding(name)]
        named = [path for path in own if says_final(names[path])]
        after = [path for path in own if order.index(path) > order.index(self.blocks)]
        return next(iter(named + after), None)

    def _is_beside_blocks(self, path: str) -> bool:
        """Whether the module's parent is one that also holds the blocks."""
        return path not in ("", self.blocks) and _within(self.blocks, path.rpartition(".")[0])

    def _find_body(self) -> tuple[str | None, str | None]:
        """(smallest module with blocks and head, its child that holds the trunk), or (None, None)."""
        if self.head is None:
            return None, None
        whole = _common_parent(self.blocks, self.head)
        if self.trunk == whole or not _within(self.trunk, whole):
            return None, None
        return whole, _child_towards(self.trunk, whole)


def _within(path: str, ancestor: str) -> bool:
    """Whether a dotted path is that of the ancestor or of something in it: h.1.attn is within h.1, h.10 is not."""
    return path == ancestor or ancestor == "" or path.startswith(f"{ancestor}.")


def _child_towards(path: str, ancestor: str) -> str:
    """The child of the ancestor in which the path lies: _child_towards("a.b.c.d", "a.b") -> "a.b.c"."""
    if ancestor == "":
        return path.split(".")[0]
    return f"{ancestor}." + path.removeprefix(f"{ancestor}.").split(".")[0]


def _common_parent(one: str, other: str) -> str:
    """The path of the smallest module that holds both: _common_parent("a.b.c", "a.b.d.e") -> "a.b"."""
    shared: list[str] = []
    for left, right in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation: its class says so, and no module below it holds parameters.

    The second half keeps out RobertaPreLayerNormAttention, an attention of a model with Norm in its name.
    """
    if isinstance(module, nn.Linear | nn.Embedding) or "norm" not in type(module).__name__.lower():
        return False
    return not holds_parameters(module.children())


def holds_parameters(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules, or a module below one, has a parameter."""
    return any(next(module.parameters(), None) is not None for module in modules)


def role_in_block(attribute: str, module: nn.Module) -> str | None:
    """The part of a block that a module is: "attention", "mlp", "mixer", or None where neither class nor name says.

    What calls itself attention is attention, also a linear one (KimiDeltaAttention). Other modules that mix tokens are
    mixers: Mamba, gated DeltaNet, recurrences, short convolutions. A module named for a norm that is none, and a whole
    decoder layer inside a block (Zamba's shared one), are containers: what they hold has to be asked.
    """
    words = [match.lastgroup for match in CLASS_WORDS.finditer(type(module).__name__)]
    if words and words[-1] != "neither":
        return words[-1]
    return next((role for role, names in ATTRIBUTES.items() if names.fullmatch(attribute)), None)


def says_position(text: str) -> bool:
    """Whether a dotted name or a class name speaks of positions: `wpe`, `embed_positions`, `...PositionalEmbedding`."""
    return bool(re.search(r"(?:^|[._])(?:pos|positions?|wpe)(?:[._]|$)|Position", text))


def says_embedding(text: str) -> bool:
    """Whether a dotted name speaks of embeddings: `embeddings.LayerNorm`, `word_embeddings_layernorm`, `mask_emb`."""
    return bool(re.search(r"(?:^|[._])(?:emb|embed|embeddings?)(?:[._]|$)", text))


def says_final(text: str) -> bool:
    """Whether a norm's name says that it comes last: `ln_f`, `final_layer_norm`, `out_norm`, `ln_out`."""
    return bool(re.search(r"(?:^|_)(?:f|final|out|output)(?:_|$)", text))
