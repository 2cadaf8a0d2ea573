"""Reads a plan from the record of a container's forward (trace.py). Nothing is concluded from a class's name."""

from __future__ import annotations

from torch import nn

from .._facts import collected
from .activations import Activation, read_activation
from .known import known, original_class
from .linears import is_linear, is_transposed, linear_class
from .plan import DROPOUTS, Add, Call, Child, Fused, Gelu, Linear, Plan, Role, last_uses
from .trace import Node, Refused, follow, is_sequential

__all__ = ["other_activation", "read_plan"]


class _Reader:
    """Reads one record. Nodes that a fused step absorbs get no value of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.record = follow(module)
        self.absorbed: set[Node] = set()
        self.values: dict[Node, int] = {}
        self.positions = {node: position for position, node in enumerate(self.record.nodes)}
        self.steps: list[Fused | Call | Add] = []
        self.children: list[Child] = []
        self.facts = list(self.record.facts)
        self.activations: dict[str, Activation | str] = {}

    def plan(self) -> Plan:
        for node in self.record.nodes:
            if node not in self.absorbed:
                self._read(node)
        inputs = tuple(node.name for node in self.record.nodes if node.kind == "input")
        called = (node.name for node in self.record.nodes if node.kind == "call")
        assert self.record.output is not None
        output = self.values[self.record.output]
        return Plan(
            original_class(type(self.module)),
            inputs,
            tuple(self.steps),
            last_uses(self.steps, output),
            output,
            len(self.values),
            collected(self.facts),
            tuple(dict.fromkeys(called)),
            tuple(self.children),
            tuple(self.module._modules) if is_sequential(self.module) else None,
            tuple(self.record.constants.items()),
        )

    def _new_value(self, node: Node) -> int:
        return self.values.setdefault(node, len(self.values))

    def _read(self, node: Node) -> None:
        if node.kind == "input":
            self._new_value(node)
            return
        if is_linear(self._child(node)) and len(node.arguments) == 1:
            fused = self._fused_from(node)
            if fused is not None:
                self.steps.append(fused)
                return
        step = self._step(node)
        if isinstance(step, Gelu):
            raise Refused("its forward computes a GELU of what is no linear layer")
        self.steps.append(step)

    def _step(self, node: Node) -> Call | Gelu | Add:
        sources = tuple(self.values[argument] for argument in node.arguments)
        if node.kind == "call":
            return Call(node.name, sources, self._new_value(node), node.looked_up)
        if node.kind == "add":
            left, right = sources
            return Add(left, right, self._new_value(node), node.name == "torch.add")
        (source,) = sources
        return Gelu(source, self._new_value(node), "tanh" if node.name == "gelu_tanh" else "none")

    def _child(self, node: Node) -> nn.Module | None:
        return self.module._modules.get(node.name) if node.kind == "call" else None

    def _activation(self, node: Node) -> str | None:
        if len(node.arguments) != 1:
            return None
        if node.kind == "gelu":
            return node.name
        found = self._read_activation(node)
        return found.form if isinstance(found, Activation) else None

    def _read_activation(self, node: Node) -> Activation | str:
        child = self._child(node)
        if child is None:
            return "is no child"
        if node.name not in self.activations:
            self.activations[node.name] = read_activation(child)
        return self.activations[node.name]

    def _only_user(self, node: Node) -> Node | None:
        if len(node.users) != 1 or node is self.record.output:
            return None
        (user,) = node.users
        between = self.record.nodes[self.positions[node] + 1 : self.positions[user]]
        # A child called in between may change in place a value that a fused step would read too early.
        return None if any(other.kind == "call" for other in between) else user

    def _precedes_gelu(self, linear: Node) -> bool:
        # Such a linear layer is better fused with its own activation.
        user = self._only_user(linear)
        return user is not None and self._activation(user) is not None

    def _skip_dropouts(self, node: Node) -> tuple[list[Node], Node | None]:
        """The dropouts and identities that follow ``node``, each the only user of the value before it; then the user of
        the last one's value, or None.
        """
        passed: list[Node] = []
        user = self._only_user(node)
        while user is not None and type(self._child(user)) in DROPOUTS:
            passed.append(user)
            user = self._only_user(user)
        return passed, user

    def _linear(self, node: Node) -> Linear:
        return Linear(node.name, is_transposed(self._child(node)))

    def _fused_from(self, linear: Node) -> Fused | None:
        nodes, fc2, activation, residual = [linear], None, None, None
        user = self._only_user(linear)
        if user is not None:
            activation = self._activation(user)
        if user is not None and activation is not None:
            nodes.append(user)
            passed, user = self._skip_dropouts(user)
            if user is not None and is_linear(self._child(user)) and not self._precedes_gelu(user):
                fc2 = user
                nodes += [*passed, user]
        if activation is None or fc2 is not None:
            passed, user = self._skip_dropouts(nodes[-1])
            if user is not None and user.kind == "add":
                value = (passed or nodes)[-1]
                other = user.arguments[1] if user.arguments[0] is value else user.arguments[0]
                if other in self.values:
                    residual = self.values[other]
                    nodes += [*passed, user]
        if activation is None and residual is None:
            return None
        self.absorbed.update(nodes)
        self._remember(nodes)
        instead = tuple(self._step(node) for node in nodes)
        return Fused(
            self.values[linear.arguments[0]],
            self._new_value(nodes[-1]),
            instead,
            self._linear(linear),
            activation or "none",
            None if fc2 is None else self._linear(fc2),
            residual,
        )

    def _remember(self, nodes: list[Node]) -> None:
        for node in nodes:
            child = self._child(node)
            if child is None:
                continue
            kind = type(child)
            if is_linear(child):
                original = linear_class(kind)
                of_class = None if original is None else known(original)
                assert original is not None and of_class is not None
                role = Role.LINEAR if original is nn.Linear else Role.TRANSPOSED_LINEAR
                found, facts = Child(node.name, int(role), original), of_class.facts
            elif kind in DROPOUTS:
                of_class = known(kind)
                assert of_class is not None
                found, facts = Child(node.name, int(Role.DROPOUT), kind), of_class.facts
            else:
                activation = self._read_activation(node)
                assert isinstance(activation, Activation)
                found = Child(node.name, int(Role.ACTIVATION), kind, activation.state, activation.of_class)
                facts = activation.facts
            self.children.append(found)
            self.facts += facts


def other_activation(module: nn.Module, plan: Plan) -> str | None:
    """The name of a child that is called between two linear layers, where a GELU would be, but is none; or None."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    calls = {step.target: step for step in plan.steps if isinstance(step, Call)}

    def called_before(step: Call) -> Call | None:
        return calls.get(step.sources[0]) if len(step.sources) == 1 else None

    for step in calls.values():
        before = called_before(step) if is_linear(children[step.name]) else None
        while before is not None and type(children[before.name]) in DROPOUTS:
            before = called_before(before)
        first = called_before(before) if before is not None else None
        if before is None or first is None:
            continue
        if is_linear(children[first.name]) and _may_activate(children[before.name]):
            return before.name
    return None


def _may_activate(module: nn.Module) -> bool:
    has_state = module._parameters or module._buffers or module._modules
    return not has_state or type(module).__module__ == nn.PReLU.__module__


def read_plan(module: nn.Module) -> Plan:
    """The plan of ``module``'s forward. Raises Refused, with the reason, if the forward has no plan."""
    return _Reader(module).plan()
