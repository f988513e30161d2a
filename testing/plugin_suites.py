"""The suites of everything that a plugin offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deltaloom.ops
import deltaloom.passes.fuse  # noqa: F401 - these two put the built-in ops and rules into their registries
from deltaloom.graph import plugins
from deltaloom.graph.errors import PluginError, require
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Backend, kernels_for, table_of
from deltaloom.testing.backend_suite import BackendSuite
from deltaloom.testing.kernel_checks import kernel_checks
from deltaloom.testing.model_suite import ModelSuite
from deltaloom.testing.op_suite import OpSuite, installed_backends
from deltaloom.testing.pass_suite import PassSuite
from deltaloom.testing.requirements import Requirements
from deltaloom.testing.rule_suite import RuleSuite
from deltaloom.testing.suite import Check, Suite


class AddedKernels(Suite):
    """The kernels that a ``plugin`` adds to ``backend``, for ops of its own and of others."""

    plugin: str
    backend: Backend

    def subject(self) -> str:
        return f"kernels of {self.plugin} for {self.backend.name}"

    def checks(self) -> Iterator[Check]:
        table = table_of(plugins.offer(self.plugin, "kernels", self.backend.name))
        for op in dict.fromkeys(kernel.op for kernel in table.kernels):
            for kernel in kernels_for(self.backend, op):
                if kernel.title.startswith(f"{self.plugin}."):
                    yield from kernel_checks(self.backend, kernel, ops.get(op))


def plugin_suites(
    name: str, backends: Sequence[Backend] | None = None, requirements: Requirements | None = None, *, prefix: str = ""
) -> list[Suite]:
    """A suite for each op, rule, pass, backend and model of the plugin ``name``, and for the kernels that it adds to a backend;
    with a longer ``prefix``, those of its ops, rules and passes alone whose names begin so.

    ``backends``: where its ops and models are run; None: the built-in ones that are installed. ``requirements`` None: the plugin's
    ``claims``. ``PluginError`` for a plugin that is not there, cannot be loaded, or offers nothing of that name."""
    plugin = plugins.load(name)
    claimed = requirements or Requirements(None if plugin.claims is None else frozenset(plugin.claims))
    where = installed_backends() if backends is None else list(backends)
    given: dict[str, Any] = {"requirements": claimed}
    own = [ops.get(op) for op in plugin.ops]
    found: list[Suite] = [OpSuite.of(op=op, backends=where, **given) for op in plugin.ops if op.startswith(prefix)]
    found += [RuleSuite.of(rule=rule, **given) for rule in plugin.rules if rule.startswith(prefix)]
    found += [PassSuite.of(step=step, ops=own, **given) for step in plugin.passes if step.startswith(prefix)]
    if prefix in ("", f"{name}."):
        found += [AddedKernels.of(plugin=name, backend=one, **given) for one in where if one.name in plugin.kernels]
        found += [BackendSuite.of(backend=one, **given) for one in plugin.backends]
        found += [ModelSuite.of(model=one, backends=[backend.name for backend in where], **given) for one in plugin.models]
    message = f"the {plugins.record(name).title} offers nothing whose name begins with '{prefix or name}'"
    require(bool(found), message, PluginError)
    return found


def about_plugin(name: str) -> dict[str, Any]:
    """What a report says of the plugin itself."""
    record, plugin = plugins.record(name), plugins.load(name)
    claims = None if plugin.claims is None else sorted(plugin.claims)
    about = {"name": name, "distribution": record.distribution or None, "version": record.version or None}
    return {**about, "api": list(plugin.api), "claims": claims}
