"""Small ways to break the operators around the kernels: what is saved, derivatives, calls from Python."""

from mutant import Mutant

MUTANTS = [
    Mutant(
        "a stack saves all of its tensors",
        "csrc/ops/autograd/stack.cpp",
        "if (!is_read(reads, positions[i], p.layers())) saved[i] = Tensor();",
        "if (!MUTANT && !is_read(reads, positions[i], p.layers())) saved[i] = Tensor();",
        "test_stack_saved.py",
    ),
    Mutant(
        "a stack's second derivatives lack what reaches z itself",
        "csrc/ops/autograd/stack.cpp",
        "if (grad_zs[i].defined()) dz = dz + grad_zs[i];",
        "if (grad_zs[i].defined() && !MUTANT) dz = dz + grad_zs[i];",
        "test_stack_saved.py",
    ),
    Mutant(
        "leaves get their gradients in the order of the heap",
        "csrc/ops/autograd/edges.h",
        "if (leaves > 2) {",
        "if (leaves > 2 && !MUTANT) {",
        "test_hooks.py",
    ),
    Mutant(
        "the identity's gradient is lost",
        "csrc/ops/autograd/layer.cpp",
        "grad_shortcut = shortcut == Shortcut::identity ? dy : Tensor();",
        "grad_shortcut = shortcut == Shortcut::identity && !MUTANT ? dy : Tensor();",
        "test_layer_gradients.py",
    ),
    Mutant(
        "x is saved although nobody needs dW",
        "csrc/ops/autograd/layer.cpp",
        "ctx->save_for_backward({need_weight || recompute_z ? x",
        "ctx->save_for_backward({MUTANT || need_weight || recompute_z ? x",
        "test_layer_saved.py",
    ),
    Mutant(
        "dW is row-major whatever the weight is",
        "csrc/ops/autograd/layer.cpp",
        "const bool column_major = need_weight && saved",
        "const bool column_major = !MUTANT && need_weight && saved",
        "test_layer_gradients.py",
    ),
    Mutant(
        "second derivatives lack what reaches z itself",
        "csrc/ops/autograd/layer.cpp",
        "if (grad_z.defined()) dz = dz.defined() ? dz + grad_z : grad_z;",
        "if (grad_z.defined()) dz = dz.defined() ? (MUTANT ? dz : dz + grad_z) : grad_z;",
        "test_layer_gradients.py",
    ),
    Mutant(
        "under autocast a float32 residual is rounded",
        "csrc/ops/autocast.cpp",
        "  const at::Tensor y = call_linear_gelu_residual(low_x, autocast.cast(weight), autocast.cast(bias),\n",
        "  if (MUTANT && residual)\n"
        "    return call_linear_gelu_residual(low_x, autocast.cast(weight), autocast.cast(bias), residual->to(low_x),\n"
        "                                     activation, recompute);\n"
        "  const at::Tensor y = call_linear_gelu_residual(low_x, autocast.cast(weight), autocast.cast(bias),\n",
        "test_layer_transforms.py",
    ),
    Mutant(
        "the library's dgrad forgets the residual's gradient",
        "csrc/ops/dense/layer_calls.cpp",
        "  if (t.grad_shortcut.defined()) {\n    at::addmm_out",
        "  if (t.grad_shortcut.defined() && !MUTANT) {\n    at::addmm_out",
        "test_layer_accuracy.py",
        path="library",
    ),
    Mutant(
        "dz takes dh's place where a shortcut still needs dh",
        "csrc/ops/dense/stack.cpp",
        "plan.uses[i].projects || (s.layers[i].adds_input && plan.reads[i].dh);",
        "!MUTANT && (plan.uses[i].projects || (s.layers[i].adds_input && plan.reads[i].dh));",
        "test_stack.py",
        path="library",
    ),
    Mutant(
        "dz of the layer before is formed without its db",
        "csrc/ops/dense/layer_calls.cpp",
        "p.db = mutable_data_of(before.db);",
        "p.db = MUTANT ? nullptr : mutable_data_of(before.db);",
        "test_mlp.py",
        path="library",
    ),
    Mutant(
        "a fused model overlooks a dropout switched on",
        "csrc/python/plan_call.cpp",
        "case Role::dropout: return !is_active(dict);",
        "case Role::dropout: return MUTANT || !is_active(dict);",
        "test_fuse_changes.py",
    ),
]
