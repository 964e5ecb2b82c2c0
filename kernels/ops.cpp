// The library's operators for torch, over torch's stable ABI: one build serves every torch since 2.10.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/infonce.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

tdro::Parallel torch_threads() {
  const int threads = int(torch::stable::get_num_threads());
  return {threads, [threads](int64_t tasks, const std::function<void(int64_t, int)>& body) {
            if (threads == 1 || tasks <= 1) {
              for (int64_t task = 0; task < tasks; ++task) body(task, 0);
              return;
            }
            const int64_t share = (tasks + threads - 1) / threads;  // neighbours stay on one thread
            torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
              for (int64_t thread = first; thread < last; ++thread)
                for (int64_t task = thread * share; task < std::min(tasks, (thread + 1) * share); ++task)
                  body(task, int(thread));
            });
          }};
}

tdro::Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return tdro::Type::float32;
    case ScalarType::BFloat16: return tdro::Type::bfloat16;
    case ScalarType::Half: return tdro::Type::float16;
    default: STD_TORCH_CHECK(false, "embeddings must be float32, bfloat16 or float16"); return tdro::Type::float32;
  }
}

// Its numbers, of any type for void.
template <class Item>
Item* items(const Tensor& tensor) {
  if constexpr (!std::is_void_v<Item>) {
    constexpr bool real = std::is_same_v<Item, float>, wide = std::is_same_v<Item, double>;
    constexpr ScalarType type = real ? ScalarType::Float : wide ? ScalarType::Double : ScalarType::Long;
    constexpr const char* name = real ? "torch.float32" : wide ? "torch.float64" : "torch.int64";
    STD_TORCH_CHECK(tensor.scalar_type() == type, "an input of the loss is of another type than ", name);
  }
  STD_TORCH_CHECK(tensor.is_contiguous(), "an input of the loss is not contiguous; call .contiguous() on it");
  return static_cast<Item*>(tensor.data_ptr());
}

template <class Item>
const Item* items(const MaybeTensor& tensor) {
  return tensor ? items<Item>(*tensor) : nullptr;
}

// What a call may use if nobody says: so much, or a quarter of its float32 gradients; less what is never counted.
constexpr int64_t WORKSPACE_BYTES = 16 << 20, SLACK_BYTES = 1 << 20;

struct Masks {
  const MaybeTensor &query_group, &document_group, &column_ids, &positive_ids, &known_ids;
  const std::optional<double>& margin;
  const MaybeTensor& log_weights;
};

tdro::Problem problem_of(const Tensor& queries, const Tensor& documents, const Tensor& positives, double temperature,
                         int64_t workspace) {
  STD_TORCH_CHECK(queries.dim() == 2 && documents.dim() == 2 && queries.size(1) == documents.size(1),
                  "queries and documents must be [rows, width] and [columns, width]");
  tdro::Problem problem{};
  problem.type = type_of(queries);
  STD_TORCH_CHECK(documents.scalar_type() == queries.scalar_type(), "queries and documents must be of one type");
  problem.rows = queries.size(0), problem.columns = documents.size(0), problem.width = queries.size(1);
  problem.queries = items<void>(queries), problem.documents = items<void>(documents);
  STD_TORCH_CHECK(positives.dim() == 1 && positives.size(0) == problem.rows, "positives must be [rows]");
  problem.positives = items<int64_t>(positives);
  problem.temperature = float(temperature);
  problem.workspace = workspace - SLACK_BYTES;
  return problem;
}

tdro::Problem problem_of(const Tensor& queries, const Tensor& documents, const Tensor& positives,
                         const Tensor& temperature, const Masks& masks) {
  tdro::Problem problem = problem_of(queries, documents, positives, *items<float>(temperature), WORKSPACE_BYTES);
  const int64_t gradients = 4 * problem.width * (problem.rows + problem.columns);
  problem.workspace = std::max(WORKSPACE_BYTES, gradients / 4) - SLACK_BYTES;
  problem.query_group = items<int64_t>(masks.query_group);
  problem.document_group = items<int64_t>(masks.document_group);
  problem.column_ids = items<int64_t>(masks.column_ids), problem.positive_ids = items<int64_t>(masks.positive_ids);
  problem.known_ids = items<int64_t>(masks.known_ids), problem.known = masks.known_ids ? masks.known_ids->size(1) : 0;
  problem.has_margin = masks.margin.has_value(), problem.margin = float(masks.margin.value_or(0.0));
  problem.log_weights = items<float>(masks.log_weights);
  return problem;
}

// An uninitialised tensor on the host. Straight from torch's C interface: small batches notice the dispatcher.
Tensor uninitialised(std::initializer_list<int64_t> sizes, int32_t type) {
  const int64_t *size = sizes.begin(), strides[2] = {sizes.size() == 2 ? size[1] : 1, 1};
  AtenTensorHandle handle = nullptr;
  const int32_t device = aoti_torch_device_type_cpu();
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), size, strides, type, device, 0, &handle) == 0,
                  "no memory for a tensor of ", sizes.size() ? size[0] : 1, " rows of ", strides[0], " numbers");
  return Tensor(handle);
}

Tensor floats(std::initializer_list<int64_t> sizes) {
  const Tensor made = uninitialised(sizes, aoti_torch_dtype_float32());
  tdro::prefer_large_pages(made.data_ptr(), size_t(made.numel()) * sizeof(float));
  return made;
}

// The gradient of a side that has one, else an empty tensor.
Tensor gradient_of(const Tensor& side, bool asked) {
  return asked ? floats({side.size(0), side.size(1)}) : floats({0, side.size(1)});
}

float* items_if(bool asked, const Tensor& gradient) { return asked ? items<float>(gradient) : nullptr; }

void check_weights(const tdro::Problem& problem, const Tensor& row_weights) {
  STD_TORCH_CHECK(row_weights.dim() == 1 && row_weights.size(0) == problem.rows, "row_weights must be [rows]");
}

void check_positives(const tdro::Problem& problem) {
  for (int64_t i = 0; i < problem.rows; ++i) {
    const int64_t column = problem.positives[i];
    STD_TORCH_CHECK(column >= 0 && column < problem.columns, "positives[", i, "] is ", column,
                    "; it must be the number of a column, 0 to ", problem.columns - 1);
  }
}

// The scaled scores of the positives, all of which must be among the columns.
Tensor own_positive_scores(const tdro::Problem& problem, const tdro::Parallel& parallel) {
  check_positives(problem);
  Tensor scores = floats({problem.rows});
  tdro::positive_scores(problem, parallel, items<float>(scores));
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> infonce_forward(Tensor queries, Tensor documents, Tensor positives,
                                                   MaybeTensor positive_scores, Tensor temperature,
                                                   MaybeTensor query_group, MaybeTensor document_group,
                                                   MaybeTensor column_ids, MaybeTensor positive_ids,
                                                   MaybeTensor known_ids, std::optional<double> margin,
                                                   MaybeTensor log_weights, bool symmetric) {
  const tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  const tdro::Parallel parallel = torch_threads();
  Tensor scores =
      positive_scores ? torch::stable::clone(*positive_scores) : own_positive_scores(problem, parallel);
  const int32_t wide = aoti_torch_dtype_float64();
  Tensor rows = uninitialised({problem.rows}, wide), columns = uninitialised({symmetric ? problem.columns : 0}, wide);
  tdro::forward(problem, parallel, items<float>(scores), items<double>(rows),
                symmetric ? items<double>(columns) : nullptr);
  return {scores, rows, columns};
}

std::tuple<Tensor, Tensor> infonce_backward(Tensor queries, Tensor documents, Tensor positives, Tensor positive_scores,
                                            Tensor temperature, MaybeTensor query_group, MaybeTensor document_group,
                                            MaybeTensor column_ids, MaybeTensor positive_ids, MaybeTensor known_ids,
                                            std::optional<double> margin, MaybeTensor log_weights, Tensor row_totals,
                                            Tensor row_factors, Tensor positive_factors, MaybeTensor column_totals,
                                            MaybeTensor column_factors) {
  const tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  const tdro::Shares shares{items<float>(positive_scores), items<float>(row_totals),  items<float>(row_factors),
                            items<float>(positive_factors), items<float>(column_totals), items<float>(column_factors)};
  Tensor for_queries = floats({problem.rows, problem.width});
  Tensor for_documents = floats({problem.columns, problem.width});
  tdro::backward(problem, torch_threads(), shares, items<float>(for_queries), items<float>(for_documents));
  return {for_queries, for_documents};
}

std::tuple<Tensor, Tensor, Tensor> infonce_losses(Tensor queries, Tensor documents, Tensor positives,
                                                  Tensor temperature, MaybeTensor query_group,
                                                  MaybeTensor document_group, MaybeTensor column_ids,
                                                  MaybeTensor positive_ids, MaybeTensor known_ids,
                                                  std::optional<double> margin, MaybeTensor log_weights,
                                                  bool keep, int64_t workspace) {
  tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  problem.workspace = workspace - SLACK_BYTES;
  const tdro::Parallel parallel = torch_threads();
  Tensor scores = own_positive_scores(problem, parallel);
  Tensor losses = floats({problem.rows});
  std::optional<Tensor> kept;
  const auto room_for = [&](int64_t room) { return items<float>(kept.emplace(floats({room}))); };
  tdro::losses(problem, parallel, items<float>(scores), items<float>(losses), keep ? room_for : tdro::RoomFor());
  return {losses, scores, kept ? *kept : floats({0})};
}

std::tuple<Tensor, Tensor> infonce_losses_backward(Tensor queries, Tensor documents, Tensor positives,
                                                   Tensor temperature, MaybeTensor query_group,
                                                   MaybeTensor document_group, MaybeTensor column_ids,
                                                   MaybeTensor positive_ids, MaybeTensor known_ids,
                                                   std::optional<double> margin, MaybeTensor log_weights, Tensor losses,
                                                   Tensor positive_scores, Tensor kept, Tensor row_weights,
                                                    int64_t workspace, bool of_queries, bool of_documents) {
  tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  problem.workspace = workspace - SLACK_BYTES;
  Tensor for_queries = gradient_of(queries, of_queries), for_documents = gradient_of(documents, of_documents);
  check_weights(problem, row_weights);
  tdro::losses_backward(problem, torch_threads(), items<float>(positive_scores), items<float>(losses),
                        items<float>(row_weights), items<float>(kept), kept.numel(),
                        items_if(of_queries, for_queries), items_if(of_documents, for_documents));
  return {for_queries, for_documents};
}

// Losses, scores of the positives, and the gradients that are asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> losses_and_gradients(const tdro::Problem& problem, const Tensor& queries,
                                                                const Tensor& documents, const Tensor& row_weights,
                                                                bool of_queries, bool of_documents) {
  check_weights(problem, row_weights);
  const tdro::Parallel parallel = torch_threads();
  Tensor scores = own_positive_scores(problem, parallel);
  Tensor losses = floats({problem.rows});
  Tensor for_queries = gradient_of(queries, of_queries), for_documents = gradient_of(documents, of_documents);
  tdro::forward_backward(problem, parallel, items<float>(scores), items<float>(row_weights), items<float>(losses),
                         items_if(of_queries, for_queries), items_if(of_documents, for_documents));
  return {losses, scores, for_queries, for_documents};
}

std::tuple<Tensor, Tensor, Tensor> infonce_forward_backward(Tensor queries, Tensor documents, Tensor positives,
                                                            Tensor row_weights, Tensor temperature,
                                                            MaybeTensor query_group, MaybeTensor document_group,
                                                            MaybeTensor column_ids, MaybeTensor positive_ids,
                                                            MaybeTensor known_ids, std::optional<double> margin,
                                                            MaybeTensor log_weights) {
  const tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  auto [losses, scores, for_queries, for_documents] =
      losses_and_gradients(problem, queries, documents, row_weights, true, true);
  return {losses, for_queries, for_documents};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_gradients(Tensor queries, Tensor documents, Tensor positives,
                                                             Tensor temperature, MaybeTensor query_group,
                                                             MaybeTensor document_group, MaybeTensor column_ids,
                                                             MaybeTensor positive_ids, MaybeTensor known_ids,
                                                             std::optional<double> margin, MaybeTensor log_weights,
                                                             Tensor row_weights, int64_t workspace, bool of_queries,
                                                             bool of_documents) {
  tdro::Problem problem =
      problem_of(queries, documents, positives, temperature,
                 {query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights});
  problem.workspace = workspace - SLACK_BYTES;
  return losses_and_gradients(problem, queries, documents, row_weights, of_queries, of_documents);
}

// The operators below are the three above without options, for calls so small that each argument is noticed.

// The weighted sum of the losses, the losses, and the gradients of that sum.
std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_plain_weighted(Tensor queries, Tensor documents, Tensor positives,
                                                                  Tensor row_weights, double temperature,
                                                                  int64_t workspace, bool of_queries,
                                                                  bool of_documents) {
  const tdro::Problem problem = problem_of(queries, documents, positives, temperature, workspace);
  auto [losses, scores, for_queries, for_documents] =
      losses_and_gradients(problem, queries, documents, row_weights, of_queries, of_documents);
  const Tensor total = floats({});
  const float *weight = items<float>(row_weights), *loss = items<float>(losses);
  double sum = 0;
  for (int64_t i = 0; i < problem.rows; ++i) sum += double(weight[i]) * loss[i];
  *items<float>(total) = float(sum);
  return {total, losses, for_queries, for_documents};
}

// The losses, which the caller may change; beside each other [2, rows] these again and the scores of the positives; and
// what is kept of the exponentials.
std::tuple<Tensor, Tensor, Tensor> infonce_plain_losses(Tensor queries, Tensor documents, Tensor positives,
                                                        double temperature, int64_t workspace) {
  const tdro::Problem problem = problem_of(queries, documents, positives, temperature, workspace);
  const tdro::Parallel parallel = torch_threads();
  check_positives(problem);
  const Tensor losses = floats({problem.rows}), sums = floats({2, problem.rows});
  float *found = items<float>(sums), *scores = found + problem.rows;
  tdro::positive_scores(problem, parallel, scores);
  std::optional<Tensor> kept;
  const auto room_for = [&](int64_t room) { return items<float>(kept.emplace(floats({room}))); };
  tdro::losses(problem, parallel, scores, found, room_for);
  std::copy(found, scores, items<float>(losses));
  return {losses, sums, kept ? *kept : floats({0})};
}

std::tuple<Tensor, Tensor> infonce_plain_losses_backward(Tensor queries, Tensor documents, Tensor positives,
                                                         Tensor sums, Tensor kept, Tensor row_weights,
                                                         double temperature, int64_t workspace, bool of_queries,
                                                         bool of_documents) {
  const tdro::Problem problem = problem_of(queries, documents, positives, temperature, workspace);
  check_weights(problem, row_weights);
  STD_TORCH_CHECK(row_weights.scalar_type() == ScalarType::Float, "row_weights must be torch.float32");
  STD_TORCH_CHECK(sums.numel() == 2 * problem.rows, "sums must be [2, rows]");
  const float *weight = static_cast<const float*>(row_weights.data_ptr()), *losses = items<float>(sums);
  std::vector<float> weights(size_t(problem.rows));  // the gradient of a mean is one number for all rows
  for (int64_t i = 0; i < problem.rows; ++i) weights[size_t(i)] = weight[i * row_weights.stride(0)];
  Tensor for_queries = gradient_of(queries, of_queries), for_documents = gradient_of(documents, of_documents);
  tdro::losses_backward(problem, torch_threads(), losses + problem.rows, losses, weights.data(), items<float>(kept),
                        kept.numel(), items_if(of_queries, for_queries), items_if(of_documents, for_documents));
  return {for_queries, for_documents};
}

std::string infonce_cpu_path() { return tdro::cpu_path(); }

}  // namespace

#define MASKS                                                                                    \
  "Tensor? query_group, Tensor? document_group, Tensor? column_ids, Tensor? positive_ids, "      \
  "Tensor? known_ids, float? margin, Tensor? log_weights"

STABLE_TORCH_LIBRARY(tdro_hpc, library) {
  library.def("infonce_forward(Tensor queries, Tensor documents, Tensor positives, Tensor? positive_scores, "
              "Tensor temperature, " MASKS ", bool symmetric) -> (Tensor, Tensor, Tensor)");
  library.def("infonce_backward(Tensor queries, Tensor documents, Tensor positives, Tensor positive_scores, "
              "Tensor temperature, " MASKS ", Tensor row_totals, Tensor row_factors, Tensor positive_factors, "
              "Tensor? column_totals, Tensor? column_factors) -> (Tensor, Tensor)");
  library.def("infonce_forward_backward(Tensor queries, Tensor documents, Tensor positives, Tensor row_weights, "
              "Tensor temperature, " MASKS ") -> (Tensor, Tensor, Tensor)");
  library.def("infonce_losses(Tensor queries, Tensor documents, Tensor positives, Tensor temperature, " MASKS
              ", bool keep, int workspace) -> (Tensor, Tensor, Tensor)");
  library.def("infonce_losses_backward(Tensor queries, Tensor documents, Tensor positives, Tensor temperature, " MASKS
              ", Tensor losses, Tensor positive_scores, Tensor kept, Tensor row_weights, int workspace, bool of_queries, "
              "bool of_documents) -> (Tensor, Tensor)");
  library.def("infonce_gradients(Tensor queries, Tensor documents, Tensor positives, Tensor temperature, " MASKS
              ", Tensor row_weights, int workspace, bool of_queries, bool of_documents) "
              "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("infonce_plain_weighted(Tensor queries, Tensor documents, Tensor positives, Tensor row_weights, "
              "float temperature, int workspace, bool of_queries, bool of_documents) "
              "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("infonce_plain_losses(Tensor queries, Tensor documents, Tensor positives, float temperature, "
              "int workspace) -> (Tensor, Tensor, Tensor)");
  library.def("infonce_plain_losses_backward(Tensor queries, Tensor documents, Tensor positives, Tensor sums, "
              "Tensor kept, Tensor row_weights, float temperature, int workspace, bool of_queries, bool of_documents) "
              "-> (Tensor, Tensor)");
  library.def("infonce_cpu_path() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tdro_hpc, CPU, library) {
  library.impl("infonce_forward", TORCH_BOX(&infonce_forward));
  library.impl("infonce_backward", TORCH_BOX(&infonce_backward));
  library.impl("infonce_forward_backward", TORCH_BOX(&infonce_forward_backward));
  library.impl("infonce_losses", TORCH_BOX(&infonce_losses));
  library.impl("infonce_losses_backward", TORCH_BOX(&infonce_losses_backward));
  library.impl("infonce_gradients", TORCH_BOX(&infonce_gradients));
  library.impl("infonce_plain_weighted", TORCH_BOX(&infonce_plain_weighted));
  library.impl("infonce_plain_losses", TORCH_BOX(&infonce_plain_losses));
  library.impl("infonce_plain_losses_backward", TORCH_BOX(&infonce_plain_losses_backward));
}

STABLE_TORCH_LIBRARY_IMPL(tdro_hpc, CompositeExplicitAutograd, library) {
  library.impl("infonce_cpu_path", TORCH_BOX(&infonce_cpu_path));
}
