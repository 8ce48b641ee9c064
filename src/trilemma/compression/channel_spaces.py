"""Which layers of a network share channels: what one layer writes, others read, add to or normalise.

The network is traced symbolically (torch.fx, Reed et al., 2022). Every convolution and linear layer makes a space of
channels; what works on each channel alone keeps it; a sum or product joins two (the dependency graph of Fang et al.,
2023, at its coarsest). What is not known to be safe (concatenation, grouped convolutions, reshapes that mix channels,
any other operation, subclasses of layers) freezes the spaces that it touches: they keep all their channels.
"""

import copy
import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, fx, nn
from torch.nn import functional as F

from trilemma.models.classifier import Classifier

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus)
_GATES = (nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh)
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_OTHERS = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d, nn.ConstantPad2d)
#: Layers whose every output channel is computed from the same input channel.
_KEEPING_LAYERS = {*_ACTIVATIONS, *_GATES, *_POOLINGS, *_OTHERS}
_KEEPING_FUNCTIONS = {
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clone, torch.square),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid, F.tanh, F.hardswish),
    *(F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
}
_KEEPING_METHODS = {"relu", "sigmoid", "tanh", "clone", "contiguous", "detach", "float"}
_JOINING = {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul}
_JOINING_METHODS = {"add", "sub", "mul"}
_REDUCING = {torch.mean, torch.sum, torch.amax, torch.amin}
_REDUCING_METHODS = {"mean", "sum", "amax", "amin"}
_WITHOUT_CHANNELS = {"ndim", "device", "dtype"}


class Space(NamedTuple):
    """Channels that can only leave together.

    Attributes:
        size: Number of channels.
        unit: Channels that leave at once: the least common multiple of the group sizes of all group normalisations
            that look at them, so that whole groups leave and the statistics of the others stay.
        frozen: Whether all must stay.
    """

    size: int
    unit: int
    frozen: bool


class ChannelSpaces(NamedTuple):
    """Names are those within the classifier; numbers are places in `spaces`.

    Attributes:
        spaces: In the order in which the network makes them; the image's come first.
        layers: The space that each plain convolution or linear layer reads, and the one that it writes.
        norms: The space that each plain normalisation looks at.
    """

    spaces: list[Space]
    layers: dict[str, tuple[int, int]]
    norms: dict[str, int]


def channel_spaces(classifier: Classifier, image_shape: tuple[int, int, int]) -> ChannelSpaces:
    """Returns which layers share channels.

    Args:
        classifier: The network; unchanged.
        image_shape: C, H and W of an image.

    Raises:
        ValueError: If it cannot be traced: where what it computes branches on values, for example.
    """
    network = copy.deepcopy(classifier).eval()
    try:
        graph = _Tracer().trace(network.module)
        shapes = _Shapes(network.module, graph).found(image_shape, network.device)
    except Exception as error:  # tracing runs the network's own code on placeholders, which may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        problem = f"the network cannot be traced ({type(error).__name__}: {reason})"
        raise ValueError(f"Which layers share channels is unknown: {problem}.") from error
    walk = _Walk(network, shapes)
    for node in graph.nodes:
        walk.visit(node)
    return walk.result()


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Returns whether a layer computes what its class says, from nothing but its own weight, bias and statistics."""
    own = {name for name, _ in layer.named_parameters()}
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return type(layer) in kinds and own <= {"weight", "bias"} and not any(hooks)


class _Tracer(fx.Tracer):
    """Looks into no layer that has a known kind of its own, subclasses included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs a traced network once and keeps the shape of every tensor."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        super().__init__(module, graph=graph)
        self._shapes: dict[fx.Node, Size] = {}

    def found(self, image_shape: tuple[int, int, int], device: torch.device) -> dict[fx.Node, Size]:
        """Returns the shapes for a batch of two images, which tells the batch from dimensions of one."""
        with torch.no_grad():
            self.run(torch.full((2, *image_shape), 0.5, device=device))
        return self._shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._shapes[n] = value.shape
        return value


class _Walk:
    """Union-find over the spaces of a graph, node by node."""

    def __init__(self, network: Classifier, shapes: dict[fx.Node, Size]):
        self._module = network.module
        self._names = {module: name for name, module in network.named_modules()}
        self._shapes = shapes
        self._distrusted = _tied(network)
        self._parent: list[int] = []
        self._size: list[int] = []
        self._frozen: set[int] = set()
        self._space: dict[fx.Node, int] = {}
        #: Of values that are no tensors: the spaces whose number of channels may have gone into them.
        self._origins: dict[fx.Node, set[int]] = {}
        self._layers: dict[nn.Module, tuple[int, int]] = {}
        self._norms: dict[nn.Module, int] = {}

    def visit(self, node: fx.Node) -> None:
        """Gives the node's output its space, and joins or freezes those that it reads."""
        if node.op == "call_module":
            known = self._visit_layer(node, self._module.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            known = self._visit_operation(node) if node in self._shapes else self._visit_number(node)
        else:
            known = False
        if not known:
            self._freeze(node)
        elif node in self._space:
            self._use_numbers(node)
        if not known and node.op == "call_module":
            self._distrust(self._module.get_submodule(str(node.target)))

    def result(self) -> ChannelSpaces:
        """Returns the spaces in the order of their first channels."""
        frozen, units = {self._root(space) for space in self._frozen}, {}
        for norm, space in self._norms.items():
            per_group = norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
            units[self._root(space)] = math.lcm(units.get(self._root(space), 1), per_group)
        roots = [space for space in range(len(self._parent)) if self._root(space) == space]
        place = {root: number for number, root in enumerate(roots)}
        spaces = [Space(self._size[root], units.get(root, 1), root in frozen) for root in roots]
        layers = {
            self._names[layer]: (place[self._root(read)], place[self._root(written)])
            for layer, (read, written) in self._layers.items()
        }
        norms = {self._names[norm]: place[self._root(space)] for norm, space in self._norms.items()}
        return ChannelSpaces(spaces, layers, norms)

    def _visit_layer(self, node: fx.Node, layer: nn.Module) -> bool:
        if len(node.all_input_nodes) != 1 or node.all_input_nodes[0] not in self._space:
            return False
        source = node.all_input_nodes[0]
        read = self._space[source]
        if is_plain(layer, nn.Conv2d, nn.Linear) and layer not in self._distrusted:
            wide = isinstance(layer, nn.Linear) and len(self._shapes[source]) != 2
            if wide or getattr(layer, "groups", 1) != 1:
                return False
            before = self._layers.get(layer)
            if before is None:
                before = self._layers[layer] = (read, self._make(node))
            self._space[node] = before[1]
            self._join(before[0], read)
            return True
        is_norm = is_plain(layer, nn.BatchNorm2d, nn.GroupNorm) and _is_sized(layer) and layer not in self._distrusted
        if not is_norm and type(layer) not in _KEEPING_LAYERS and not self._is_flatten(node, layer):
            return False
        self._space[node] = read
        if is_norm:
            self._join(self._norms.setdefault(layer, read), read)
        return True

    def _visit_operation(self, node: fx.Node) -> bool:
        method = node.target if node.op == "call_method" else None
        sources = [source for source in node.all_input_nodes if source in self._space]
        if method in _JOINING_METHODS or node.target in _JOINING:
            return self._visit_joining(node)
        if not sources or node.args[:1] != (sources[0],) or len(sources) != 1:
            return False
        keeps = method in _KEEPING_METHODS or node.target in _KEEPING_FUNCTIONS
        keeps = keeps or ((method in _REDUCING_METHODS or node.target in _REDUCING) and self._reduces_space(node))
        if not keeps and not self._is_reshape(node):
            return False
        self._space[node] = self._space[sources[0]]
        return True

    def _visit_number(self, node: fx.Node) -> bool:
        """Notes whose number of channels a value that is no tensor may depend on."""
        tensors = [source for source in node.all_input_nodes if source in self._shapes]
        shape = node.target == "size" or (node.target is getattr and node.args[1] == "shape")
        without = node.target == "dim" or (node.target is getattr and node.args[1] in _WITHOUT_CHANNELS)
        if tensors and not shape and not without:
            return False
        origins = {self._space[tensor] for tensor in tensors if tensor in self._space}
        origins = origins.union(*(self._origins.get(source, ()) for source in node.all_input_nodes))
        batch = node.target in ("size", operator.getitem) and node.args[1:] == (0,)
        batch = batch and (node.target == "size" or _is_shape(node.args[0]))
        self._origins[node] = set() if without or batch else origins
        return True

    def _use_numbers(self, node: fx.Node) -> None:
        """Binds a tensor to the spaces whose number of channels it was shaped by."""
        for origin in set().union(*(self._origins.get(source, ()) for source in node.all_input_nodes)):
            if self._size[origin] == self._size[self._space[node]]:
                self._join(origin, self._space[node])
            else:
                self._frozen.update((origin, self._space[node]))

    def _visit_joining(self, node: fx.Node) -> bool:
        """Joins the spaces of two tensors of equal channels; one tensor and a written number keep theirs."""
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node) and argument in self._space]
        numbers = [argument for argument in node.args if isinstance(argument, (int, float))]
        if not tensors or len(tensors) + len(numbers) != len(node.args) or node.kwargs:
            return False
        if len({(len(self._shapes[tensor]), self._shapes[tensor][1]) for tensor in tensors}) != 1:
            return False
        self._space[node] = self._space[tensors[0]]
        for tensor in tensors[1:]:
            self._join(self._space[tensors[0]], self._space[tensor])
        return True

    def _reduces_space(self, node: fx.Node) -> bool:
        """Returns whether a mean, sum or extremum runs over height and width only."""
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        rank = len(self._shapes[node.all_input_nodes[0]])
        whole = isinstance(dims, (tuple, list)) and all(isinstance(dim, int) for dim in dims)
        return whole and len(dims) > 0 and min(dim % rank for dim in dims) >= 2

    def _is_flatten(self, node: fx.Node, layer: nn.Module) -> bool:
        return type(layer) is nn.Flatten and self._keeps_channels(node)

    def _is_reshape(self, node: fx.Node) -> bool:
        """Returns whether only dimensions of one come or go, whatever the number of channels is."""
        if node.target == "flatten" or node.target is torch.flatten:
            return self._keeps_channels(node)
        if node.target not in ("view", "reshape") and node.target is not torch.reshape:
            return False
        sizes = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        written = len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] != -1  # a number that would stay as it is
        return not written and self._keeps_channels(node)

    def _keeps_channels(self, node: fx.Node) -> bool:
        before, after = self._shapes[node.all_input_nodes[0]], self._shapes[node]
        alike = len(before) > 1 and len(after) > 1 and before[:2] == after[:2]
        return alike and math.prod(before[2:]) == math.prod(after[2:]) == 1

    def _freeze(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self._frozen.update(self._origins.get(source, ()))
            if source in self._space:
                self._frozen.add(self._space[source])
        if len(self._shapes.get(node, ())) > 1 and node.op != "output":
            self._frozen.add(self._make(node))

    def _distrust(self, layer: nn.Module) -> None:
        """Keeps a layer as it is in all of its calls, as one of them is not understood."""
        self._distrusted.add(layer)
        self._frozen.update(self._layers.get(layer, ()))
        if layer in self._norms:
            self._frozen.add(self._norms[layer])

    def _make(self, node: fx.Node) -> int:
        self._space[node] = len(self._parent)
        self._parent.append(len(self._parent))
        self._size.append(self._shapes[node][1])
        return self._space[node]

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self._parent[second] = first

    def _root(self, space: int) -> int:
        while self._parent[space] != space:
            space = self._parent[space]
        return space


def _is_shape(value: Any) -> bool:
    """Returns whether a value is all of a tensor's shape, the batch first."""
    if not isinstance(value, fx.Node):
        return False
    whole = value.target == "size" and len(value.args) == 1 and not value.kwargs
    return whole or (value.target is getattr and value.args[1:] == ("shape",))


def _is_sized(norm: nn.Module) -> bool:
    """Returns whether a normalisation holds a tensor that tells its number of channels to who loads it."""
    return getattr(norm, "weight", None) is not None or getattr(norm, "running_mean", None) is not None


def _tied(network: nn.Module) -> set[nn.Module]:
    """Returns the layers that share a tensor with another one."""
    owners: dict[int, set[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return set().union(*(modules for modules in owners.values() if len(modules) > 1))
