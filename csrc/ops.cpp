#include <torch/csrc/stable/library.h>

// What all ops are told of a problem's costs.
#define GEOMETRY                                                                                                 \
  "Tensor? matrix, Tensor? segment_x, Tensor? segment_y, Tensor? label_x, Tensor? label_y, Tensor? label_cost, " \
  "int cost, int? diagonal"

// What is solved, and how.
#define SOLVE                                                                                               \
  "Tensor x, Tensor y, Tensor a, Tensor b, Tensor eps, Tensor? f0, Tensor? g0, " GEOMETRY                   \
  ", int max_iter, float? tol, Tensor? start, float factor, Tensor? schedule, float? rho_x, float? rho_y, " \
  "float relax, bool simultaneous, bool self, int memory_limit, int precision, bool closing"

// Linear layers on x, whose columns from `low` on are differentiated; all but the last have an activation, of two
// options.
#define MLP "Tensor x, int low, Tensor[] weights, Tensor?[] shifts, int[] kinds, float[] options"

// Attention [B, H, N, D] with tangents [K, B, H, N, D], None where zero; the mask broadcasts.
#define ATTENTION "Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? mask"

#define SOLUTION "Tensor f, Tensor g, Tensor value, Tensor residual, Tensor iterations, Tensor converged"

STABLE_TORCH_LIBRARY(fewstep, m) {
  m.def("sinkhorn(" SOLVE ") -> (" SOLUTION ")");
  m.def("sinkhorn_with_grad(" SOLVE ", bool want_x, bool want_y) -> (" SOLUTION ", Tensor grad_x, Tensor grad_y)");
  m.def("sinkhorn_transport(Tensor x, Tensor y, Tensor f, Tensor g, Tensor b, Tensor eps, Tensor v, " GEOMETRY
        ") -> (Tensor out, Tensor mass)");
  m.def("sinkhorn_grad(Tensor x, Tensor y, Tensor f, Tensor g, Tensor a, Tensor b, Tensor eps, " GEOMETRY
        ") -> Tensor");
  m.def(
      "sinkhorn_part(Tensor x, Tensor y, Tensor a, Tensor h, Tensor? f, int cost, float scale, float damping,"
      " float target, bool want_columns) -> (Tensor f_next, Tensor columns, Tensor numbers)");
  m.def(
      "sinkhorn_drift(Tensor x, Tensor y, Tensor x_self, Tensor? uncond, Tensor weights, Tensor guidance, Tensor eps,"
      " int cost, int max_iter, bool joint, bool scaled, bool unit, int? diagonal, int memory_limit,"
      " int precision)"
      " -> (Tensor velocity, Tensor scale, Tensor rms, Tensor residual, Tensor entropy, Tensor peak)");

  // Stacks [(K + 1) B, ...]: the primal, then K tangents. A probe is known by (seed, step, stage) = key and its sample.
  m.def(
      "dual_activate(Tensor z, Tensor? shared, Tensor? shift, int tangents, int kind, float beta, float threshold,"
      " int inner) -> Tensor");
  m.def(
      "dual_activate_backward(Tensor g, Tensor z, Tensor? shared, Tensor? shift, int tangents, int kind, float beta,"
      " float threshold, int inner) -> Tensor");
  m.def(
      "dual_norm(Tensor z, Tensor? shift, Tensor? weight, Tensor? bias, int tangents, int groups, bool centred,"
      " float eps) -> Tensor");
  m.def(
      "dual_norm_backward(Tensor g, Tensor z, Tensor? shift, Tensor? weight, int tangents, int groups, bool centred,"
      " float eps) -> (Tensor gz, Tensor gw, Tensor gb)");
  // The tangents alone of what a stack of z [B, ...] and u [K B, ...] would be.
  m.def(
      "dual_norm_tangents(Tensor z, Tensor u, Tensor? weight, int groups, bool centred,"
      " float eps) -> Tensor");
  // The same with tangents u [K B, ...] in bfloat16 beside a float32 primal z [B, ...].
  m.def(
      "dual_activate_pair(Tensor z, Tensor u, Tensor? shift, int kind, float beta, float threshold, int inner)"
      " -> (Tensor a, Tensor t)");
  m.def(
      "dual_activate_pair_backward(Tensor ga, Tensor gt, Tensor z, Tensor u, Tensor? shift, int kind, float beta,"
      " float threshold, int inner) -> (Tensor gz, Tensor gu)");
  m.def(
      "dual_norm_pair(Tensor z, Tensor u, Tensor? shift, Tensor? weight, Tensor? bias, int groups, bool centred,"
      " float eps) -> (Tensor a, Tensor t)");
  m.def(
      "dual_norm_pair_backward(Tensor ga, Tensor gt, Tensor z, Tensor u, Tensor? shift, Tensor? weight, int groups,"
      " bool centred, float eps) -> (Tensor gz, Tensor gu, Tensor gw, Tensor gb)");
  // A constant's derivative is not asked for; backward has none of tangents where there are 0.
  m.def("dual_attention(" ATTENTION
        ", bool causal, float scale, int tangents, bool constant)"
        " -> (Tensor out, Tensor moved, Tensor lse, Tensor mean)");
  m.def("dual_attention_backward(Tensor go, Tensor? gt, " ATTENTION
        ", Tensor out, Tensor? moved, Tensor lse, Tensor? mean, bool causal, float scale, int tangents)"
        " -> (Tensor gq, Tensor gk, Tensor gv, Tensor gtq, Tensor gtk, Tensor gtv)");
  m.def("probe(Tensor like, Tensor key, Tensor? ids, int probes, int kind) -> Tensor");
  m.def("probe_dot(Tensor y, Tensor key, Tensor? ids, int probes, int kind) -> Tensor");
  m.def("mlp_probes(" MLP
        ", Tensor key, Tensor? ids, int probes, int probe, Tensor? first, Tensor? last, bool keep)"
        " -> (Tensor velocity, Tensor dots, Tensor kept, Tensor last)");
  m.def("mlp_backward(Tensor grad_velocity, Tensor grad_dots, " MLP
        ", Tensor key, Tensor? ids, int probe, Tensor last, Tensor kept, bool[] wanted) -> Tensor[]");
  m.def("mlp_trace(" MLP ", Tensor? core) -> (Tensor velocity, Tensor value)");
  m.def("probe_scale(Tensor g, Tensor key, Tensor? ids, int d, int kind) -> Tensor");

  // One element-wise pass of a sampler outside its network; row `row` of the table [K, 1 or B, 8] has the coefficients.
  m.def(
      "heun_combine(Tensor x, Tensor? low, Tensor[] terms, Tensor table, int row, bool want_low, bool want_net)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "heun_combine_out(Tensor x, Tensor? low, Tensor[] terms, Tensor table, int row, Tensor? seeds,"
      " Tensor(a!)? high, Tensor(b!)? out_low, Tensor(c!)? net, Tensor(d!)? wrong) -> ()");
}
