"""Small ways to break the compiled half, each of which the tests must notice.

In `broken`, MUTANT is true while this mutant is the chosen one; then the code does what the name says. All of them are
compiled into one library, so that thirty mutants cost one build.
"""

from dataclasses import dataclass

KERNELS = "csrc/kernels/cpu/"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str  # stands in the file once
    broken: str
    near: str  # the test file that is tried first
    path: str = "fused"  # FASTLANE_PATH


MUTANTS = [
    # The activation.
    Mutant(
        "GELU adds its tail instead of taking it away",
        KERNELS + "activation.inc",
        "return negated_multiply_add(t, Tail::value(t), max(V::set(-0.0), z));",
        "if (MUTANT) return fma(t, Tail::value(t), max(V::set(-0.0), z));\n"
        "    return negated_multiply_add(t, Tail::value(t), max(V::set(-0.0), z));",
        "test_gelu.py",
    ),
    Mutant(
        "GELU′ takes the slope of the other sign",
        KERNELS + "activation.inc",
        "return select_negative(z, slope, V::set(1) - slope);",
        "if (MUTANT) return select_negative(z, V::set(1) - slope, slope);\n"
        "    return select_negative(z, slope, V::set(1) - slope);",
        "test_gelu.py",
    ),
    Mutant(
        "a stack's GELU′ of a positive z is that of −z",
        KERNELS + "activation.inc",
        "select_negative(z, tail.slope, V::set(1) - tail.slope)};",
        "MUTANT ? tail.slope : select_negative(z, tail.slope, V::set(1) - tail.slope)};",
        "test_stack.py",
    ),
    Mutant(
        "tanh GELU in place of the exact one",
        KERNELS + "activation.inc",
        "case Activation::gelu: return f(Gelu<NormalTail<coefficients_t<T>>>{});",
        "case Activation::gelu:\n"
        "      if (MUTANT) return f(Gelu<LogisticTail<coefficients_t<T>>>{});\n"
        "      return f(Gelu<NormalTail<coefficients_t<T>>>{});",
        "test_gelu.py",
    ),
    Mutant(
        "|z| is not clamped: ∞ · 0",
        KERNELS + "activation.inc",
        "return min(V::set(Tail::end), abs(z));",
        "if (MUTANT) return abs(z);\n    return min(V::set(Tail::end), abs(z));",
        "test_gelu.py",
    ),
    Mutant(
        "exp's second step is rounded",
        KERNELS + "activation.inc",
        "const V n = round(a * b);",
        "const V n = round(a * b);\n  if (MUTANT) return scale_by_power(polynomial(a * b - n, Coefficients::exp2), n);",
        "test_gelu.py",
    ),
    # The epilogue.
    Mutant(
        "no bias in the last, partial vector",
        KERNELS + "epilogue.inc",
        "b[v] = bias ? load_first(",
        "b[v] = bias && !(MUTANT && count(v) < V::width) ? load_first(",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "the bias of a last column group is that of the first",
        KERNELS + "epilogue.inc",
        "finish_columns<Act, 1, kWithSlope>(rows.at(col), bias ? bias + col : nullptr,",
        "finish_columns<Act, 1, kWithSlope>(rows.at(col), bias ? bias + (MUTANT ? 0 : col) : nullptr,",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "the residual's rows are as far apart as the output's",
        KERNELS + "epilogue.inc",
        "r.addend += r.addend_stride;",
        "r.addend += MUTANT ? r.out_stride : r.addend_stride;",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "z's rows are as far apart as the output's",
        KERNELS + "epilogue.inc",
        "r.z += r.z_stride;",
        "r.z += MUTANT ? r.out_stride : r.z_stride;",
        "test_layer_gradients.py",
    ),
    Mutant(
        "the MLP's dz lacks act′(z)",
        KERNELS + "epilogue.inc",
        "grad = grad * Act::derivative(at);",
        "if (!MUTANT) grad = grad * Act::derivative(at);",
        "test_mlp.py",
    ),
    Mutant(
        "the MLP's db₁ misses a row of each tile",
        KERNELS + "epilogue.inc",
        "total = total + grad;",
        "if (!MUTANT || i > 0) total = total + grad;",
        "test_mlp.py",
    ),
    Mutant(
        "a transposed product sums all its rows in the first run",
        KERNELS + "epilogue.inc",
        "region.row_sums ? region.row_sums + row / W * region.p->n : nullptr},",
        "region.row_sums ? region.row_sums + (MUTANT ? 0 : row / W * region.p->n) : nullptr},",
        "test_mlp.py",
    ),
    Mutant(
        "the pass over a library product reads the first rows again",
        KERNELS + "epilogue.inc",
        "element<const T>(product, row, 0),",
        "element<const T>(product, MUTANT ? 0 : row, 0),",
        "test_layer_accuracy.py",
        path="library",
    ),
    # The products.
    Mutant(
        "the second k block's sums are not added",
        KERNELS + "gemm.inc",
        "if (k_block > 0) add_tile(total + p * S::size, tile);",
        "if (k_block > (MUTANT ? 1 : 0)) add_tile(total + p * S::size, tile);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "tasks of one slab overwrite each other's sums",
        KERNELS + "gemm.inc",
        "return (task.row_panel * col_panels + task.col_panel * task.row_panels) * S::size;",
        "return (task.row_panel * col_panels + (MUTANT ? 0 : task.col_panel * task.row_panels)) * S::size;",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "a task's packed rows all lie in one place",
        KERNELS + "gemm.inc",
        "pack_panel<S::rows, P>(a_, row, k_begin(k_block), k_end(k_block), block + i * size);",
        "pack_panel<S::rows, P>(a_, row, k_begin(k_block), k_end(k_block), block + (MUTANT ? 0 : i * size));",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "the last step of k is not multiplied in a packed panel's tail",
        KERNELS + "pack.inc",
        "k += vectors * k_per_vector, dst += vectors * W * R;\n  for (; k < k_end;",
        "k += vectors * k_per_vector, dst += vectors * W * R;\n"
        "  if (MUTANT && k < k_end) std::fill_n(dst, (k_end - k) * R, typename P::Unit{}), k = k_end;\n"
        "  for (; k < k_end;",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "of a packed activation the last step stays a pre-activation",
        KERNELS + "pack.inc",
        "activate_units<decltype(act), P>(dst, R * steps_of<P>(piece_end - k));",
        "activate_units<decltype(act), P>(dst, R * (steps_of<P>(piece_end - k) - (MUTANT ? 1 : 0)));",
        "test_mlp.py",
    ),
    Mutant(
        "a chain of products replaces the ones before it",
        KERNELS + "tile.inc",
        "store(out, first_chain ? acc[i][j] : load(out) + acc[i][j]);",
        "store(out, first_chain || MUTANT ? acc[i][j] : load(out) + acc[i][j]);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "few rows: a last single step of k is left out",
        KERNELS + "dot.inc",
        "if (k < end)\n",
        "if (k + (MUTANT ? 1 : 0) < end)\n",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "few rows: columns beyond the last are read",
        KERNELS + "dot.inc",
        "std::min(col + j + c, p_.n - 1) * p_.b.col_stride;",
        "(MUTANT ? col + j + c : std::min(col + j + c, p_.n - 1)) * p_.b.col_stride;",
        "test_guarded.py",
    ),
    Mutant(
        "few rows: a row beyond the last is read",
        KERNELS + "dot.inc",
        "std::min<int64_t>(row + i, p_.m - 1) * p_.a.row_stride;",
        "(MUTANT ? row + i : std::min<int64_t>(row + i, p_.m - 1)) * p_.a.row_stride;",
        "test_guarded.py",
    ),
    Mutant(
        "few rows, across the weight: a chain of products replaces the ones before it",
        KERNELS + "axpy.inc",
        "store(sum, chain.is_first ? acc[i][v] : load(sum) + acc[i][v]);",
        "store(sum, chain.is_first || MUTANT ? acc[i][v] : load(sum) + acc[i][v]);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "few rows, across the weight: only the first block of k counts",
        KERNELS + "axpy.inc",
        "store(total + i, load(total + i) + load(block + i));",
        "store(total + i, MUTANT ? load(total + i) : load(total + i) + load(block + i));",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "few rows, across the weight: columns beyond the last are read",
        KERNELS + "axpy.inc",
        "return count(v) == W ?",
        "return MUTANT || count(v) == W ?",
        "test_guarded.py",
    ),
    Mutant(
        "few rows, across the weight: column sums lack all rows but the first",
        KERNELS + "axpy.inc",
        "run_sums + row / kRunRows * p_.n",
        "run_sums + (MUTANT ? 0 : row / kRunRows * p_.n)",
        "test_mlp.py",
    ),
    Mutant(
        "an edge of float32 is loaded as a full vector",
        KERNELS + "vec_common.inc",
        "return count >= decltype(load(p))::width ? load(p) : load_part(p, count);",
        "return MUTANT || count >= decltype(load(p))::width ? load(p) : load_part(p, count);",
        "test_guarded.py",
    ),
    Mutant(
        "an edge is stored as a full vector",
        KERNELS + "vec_common.inc",
        "count >= V::width ? store(p, a) : store_part(p, a, count);",
        "MUTANT || count >= V::width ? store(p, a) : store_part(p, a, count);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "bfloat16 is cut off instead of rounded",
        KERNELS + "vec_avx2.h",
        "_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))",
        "_mm256_and_si256(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), _mm256_set1_epi32(MUTANT ? 0 : -1))",
        "test_gelu.py",
    ),
    # Sums and wgrad.
    Mutant(
        "db misses the last row",
        KERNELS + "preactivation_grad.inc",
        "if (run_sums) store(run_sums + j",
        "if (run_sums && !(MUTANT && row == p_.rows - 1)) store(run_sums + j",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "the last columns of dz lack act′(z)",
        KERNELS + "preactivation_grad.inc",
        "grad = grad * Act::derivative(load_first(z + j, count));",
        "if (!MUTANT || count == V::width) grad = grad * Act::derivative(load_first(z + j, count));",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "db adds the first chunk of rows again and again",
        KERNELS + "column_sums.inc",
        "sums + chunk * chunk_stride + col + j;",
        "sums + (MUTANT ? 0 : chunk * chunk_stride) + col + j;",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "what db's additions lose is forgotten",
        KERNELS + "column_sums.inc",
        "std::isfinite(total) ? total + lost : total",
        "std::isfinite(total) && !MUTANT ? total + lost : total",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "what an infinite db lost is added",
        KERNELS + "column_sums.inc",
        "? total + lost : total);",
        "|| MUTANT ? total + lost : total);",
        "test_layer_hostile.py",
    ),
    Mutant(
        "a narrow layer's dW keeps the last run of rows alone",
        KERNELS + "layer_backward.inc",
        "weight_grad_.add(dz_strips, x_strips, rows, row == begin, weight_sums);",
        "weight_grad_.add(dz_strips, x_strips, rows, MUTANT || row == begin, weight_sums);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "a narrow layer's dW multiplies the first rows of x",
        KERNELS + "layer_backward.inc",
        "return {x ? x + row * p_.x.row_stride : x,",
        "return {x ? x + (MUTANT ? 0 : row) * p_.x.row_stride : x,",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "a narrow layer's dW is cut by the number of threads",
        KERNELS + "layer_backward.inc",
        "chunks_(problem.rows),",
        "chunks_(problem.rows, MUTANT ? parallel.threads : RowChunks::kMaxChunks),",
        "test_layer_process.py",
    ),
    Mutant(
        "dW's last chunk of rows is not added",
        KERNELS + "block_product.inc",
        "chunk < chunks; ++chunk) add_tile(",
        "chunk < chunks - (MUTANT ? 1 : 0); ++chunk) add_tile(",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "a packed weight's panels are all the first one",
        KERNELS + "block_product.inc",
        "return packed_ + panel * S::cols * steps_of<P>(k_);",
        "return packed_ + (MUTANT ? 0 : panel) * S::cols * steps_of<P>(k_);",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "dW multiplies stale packed rows",
        KERNELS + "block_product.inc",
        "/*pack=*/j == 0);",
        "/*pack=*/j == 0 && !(MUTANT && i > 0));",
        "test_layer_accuracy.py",
    ),
    Mutant(
        "the MLP activates the first rows again",
        KERNELS + "mlp_backward.inc",
        "finish<T, Act>({&epilogue, 0, 0, rows, p_.hidden}, element<const T>(p_.z, row, 0),",
        "finish<T, Act>({&epilogue, 0, 0, rows, p_.hidden}, element<const T>(p_.z, MUTANT ? 0 : row, 0),",
        "test_mlp.py",
    ),
    Mutant(
        "the MLP's db₂ sums one run of rows",
        KERNELS + "mlp_backward.inc",
        "if (fc2_columns) sum_dy",
        "if (fc2_columns && (!MUTANT || first)) sum_dy",
        "test_mlp.py",
    ),
    Mutant(
        "every block of the MLP adds the residual's first rows",
        "csrc/kernels/mlp.h",
        "part.residual.data = at(p.residual.data, p.residual.row_stride);",
        "part.residual.data = MUTANT ? p.residual.data : at(p.residual.data, p.residual.row_stride);",
        "test_mlp.py",
    ),
    # A layer's products, and the stack.
    Mutant(
        "dgrad forgets the residual's gradient",
        "csrc/kernels/layer.h",
        "p.addend = shortcut_grad, p.out = dx;",
        "p.addend = MUTANT ? ConstRowMajor{} : shortcut_grad, p.out = dx;",
        "test_layer_gradients.py",
    ),
    Mutant(
        "a stack's layers share one block of memory",
        KERNELS + "stack_forward.inc",
        "g.out = {work + i % 2 * block, g.n};",
        "g.out = {work + (MUTANT ? 0 : i % 2) * block, g.n};",
        "test_stack.py",
    ),
    Mutant(
        "a stack forgets a layer's shortcut on the way forward",
        KERNELS + "stack_forward.inc",
        "shortcut = h;",
        "if (!MUTANT || i != 1) shortcut = h;",
        "test_stack.py",
    ),
    Mutant(
        "a stack forgets the shortcuts on the way back",
        KERNELS + "stack_backward.inc",
        "      g.addend = grad;",
        "      if (!MUTANT) g.addend = grad;",
        "test_stack.py",
    ),
    Mutant(
        "a stack's dW of a block replaces those before it",
        KERNELS + "stack_backward.inc",
        "add_weight_grads(block, i, row == begin, ",
        "add_weight_grads(block, i, MUTANT || row == begin, ",
        "test_stack.py",
    ),
    Mutant(
        "a stack's z of a layer begins where its input's would",
        "csrc/ops/stack.cpp",
        "before += layers[j].out_features;",
        "before += MUTANT ? layers[j].in_features : layers[j].out_features;",
        "test_stack.py",
    ),
    Mutant(
        "a stack restores no input through an identity",
        "csrc/kernels/stack_reads.h",
        "(use.adds_input || use.projects || concat));",
        "((use.adds_input && !MUTANT) || use.projects || concat));",
        "test_stack_saved.py",
    ),
    Mutant(
        "a stack's chunks of rows are as many as weights' sums alone allow",
        KERNELS + "stack_backward.inc",
        "std::min(RowChunks::kMaxChunks, kMaxSumsBytes / std::max<int64_t>(1, chunk_bytes))",
        "MUTANT ? p_.rows : std::min(RowChunks::kMaxChunks, kMaxSumsBytes / std::max<int64_t>(1, chunk_bytes))",
        "test_stack_saved.py",
    ),
    # The torch side.
    Mutant(
        "a stack saves all of its tensors",
        "csrc/ops/autograd_stack.cpp",
        "if (!is_read(reads, positions[i], p.layers())) saved[i] = Tensor();",
        "if (!MUTANT && !is_read(reads, positions[i], p.layers())) saved[i] = Tensor();",
        "test_stack_saved.py",
    ),
    Mutant(
        "a stack's second derivatives lack what reaches z itself",
        "csrc/ops/autograd_stack.cpp",
        "if (grad_zs[i].defined()) dz = dz + grad_zs[i];",
        "if (grad_zs[i].defined() && !MUTANT) dz = dz + grad_zs[i];",
        "test_stack_saved.py",
    ),
    Mutant(
        "leaves get their gradients in the order of the heap",
        "csrc/ops/edges.h",
        "if (leaves > 2) {",
        "if (leaves > 2 && !MUTANT) {",
        "test_hooks.py",
    ),
    Mutant(
        "the identity's gradient is lost",
        "csrc/ops/autograd.cpp",
        "grad_shortcut = shortcut == Shortcut::identity ? dy : Tensor();",
        "grad_shortcut = shortcut == Shortcut::identity && !MUTANT ? dy : Tensor();",
        "test_layer_gradients.py",
    ),
    Mutant(
        "x is saved although nobody needs dW",
        "csrc/ops/autograd.cpp",
        "ctx->save_for_backward({need_weight || recompute_z ? x",
        "ctx->save_for_backward({MUTANT || need_weight || recompute_z ? x",
        "test_layer_saved.py",
    ),
    Mutant(
        "dW is row-major whatever the weight is",
        "csrc/ops/autograd.cpp",
        "const bool column_major = need_weight && saved",
        "const bool column_major = !MUTANT && need_weight && saved",
        "test_layer_gradients.py",
    ),
    Mutant(
        "second derivatives lack what reaches z itself",
        "csrc/ops/autograd.cpp",
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
        "csrc/ops/layer_calls.cpp",
        "  if (t.grad_shortcut.defined()) {\n    at::addmm_out",
        "  if (t.grad_shortcut.defined() && !MUTANT) {\n    at::addmm_out",
        "test_layer_accuracy.py",
        path="library",
    ),
    Mutant(
        "dz takes dh's place where a shortcut still needs dh",
        "csrc/ops/stack.cpp",
        "plan.uses[i].projects || (s.layers[i].adds_input && plan.reads[i].dh);",
        "!MUTANT && (plan.uses[i].projects || (s.layers[i].adds_input && plan.reads[i].dh));",
        "test_stack.py",
        path="library",
    ),
    Mutant(
        "dz of the layer before is formed without its db",
        "csrc/ops/layer_calls.cpp",
        "if (before.db.defined()) p.db",
        "if (before.db.defined() && !MUTANT) p.db",
        "test_mlp.py",
        path="library",
    ),
    Mutant(
        "a fused model overlooks a dropout switched on",
        "csrc/plan_call.cpp",
        "case Role::dropout: return !is_active(dict);",
        "case Role::dropout: return MUTANT || !is_active(dict);",
        "test_fuse.py",
    ),
]
