"""The intermediate representation: Program, the `graphopt::` dialect, rewriter and rules, printing, verifier."""

from graphopt.ir import dialect
from graphopt.ir.arguments import arguments, operator
from graphopt.ir.exported import from_exported, source_line, to_exported
from graphopt.ir.precision import retype
from graphopt.ir.printing import digest, node_text, program_text, type_text
from graphopt.ir.program import Program, ProgramModule, Signature, is_floating, is_tensor, static_shape
from graphopt.ir.rewriter import Changes, Edit, Rewriter, Site, module_path, provenance
from graphopt.ir.rules import Match, Rule, apply_rules, constant, finite, floating, rule, sole_user
from graphopt.ir.trainable import trainable
from graphopt.ir.verify import VerificationError, verify

__all__ = [
    "Changes", "Edit", "Match", "Program", "ProgramModule", "Rewriter", "Rule", "Signature", "Site",
    "VerificationError", "apply_rules", "arguments", "constant", "dialect", "digest", "finite", "floating",
    "from_exported", "is_floating", "is_tensor", "module_path", "node_text", "operator", "program_text", "provenance",
    "retype", "rule", "sole_user", "source_line", "static_shape", "to_exported", "trainable", "type_text", "verify",
]  # fmt: skip
