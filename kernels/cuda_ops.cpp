// The kernels of cuda/tiles.h as operators of torch, over torch's stable ABI. losses/cuda_core.py puts them together.
#ifdef WITH_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "cuda/tiles.h"

// Tests build this file a second time, for emulated kernels on the CPU.
#ifndef TDRO_TILE_NAMESPACE
#define TDRO_TILE_NAMESPACE tdro_hpc
#define TDRO_TILE_DEVICE CUDA
#endif

// torch for CPUs has no such function. Without the attribute the library could not be loaded there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// How a tile lies in what belongs to all rows and all columns.
struct Place {
  const Tensor& scores;
  int64_t first_row, first_column, rows, columns;  // rows and columns of all groups of the tile
};

void* stream_of(const Tensor& tensor) {
  if (!tensor.is_cuda()) return nullptr;  // emulated
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA; install one that has");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check(int error) {
  STD_TORCH_CHECK(error == 0, "a CUDA kernel of the loss was not started: ", tdro_cuda_error(error));
}

template <class Item>
constexpr ScalarType kType = sizeof(Item) == 8 ? ScalarType::Long : ScalarType::Float;

// The numbers of a tensor from `first` on; `wanted` of them are used.
template <class Item>
Item* items(const char* name, const Tensor& tensor, const Tensor& beside, int64_t first, int64_t wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == kType<Item>, name, " must be ", sizeof(Item) == 8 ? "int64" : "float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; call .contiguous() on it");
  STD_TORCH_CHECK(tensor.is_cuda() == beside.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
                  " is on another device than the scores");
  STD_TORCH_CHECK(first >= 0 && first + wanted <= tensor.numel(), name, " has ", tensor.numel(), " elements; ", first,
                  " to ", first + wanted, " are asked for");
  return static_cast<Item*>(tensor.data_ptr()) + first;
}

template <class Item>
Item* items(const char* name, const MaybeTensor& tensor, const Tensor& beside, int64_t first, int64_t wanted) {
  return tensor ? items<Item>(name, *tensor, beside, first, wanted) : nullptr;
}

struct Masks {
  const Tensor &temperature, &positives;
  const MaybeTensor &query_group, &document_group, &column_ids, &positive_ids, &known_ids, &limits, &log_weights;
};

Place place_of(const Tensor& scores, int64_t columns, int64_t first_row, int64_t first_column) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.size(2) % 4 == 0 && columns <= scores.size(2),
                  "scores must be [groups, rows, stride], with a stride that holds the columns and is a multiple of 4");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(scores.data_ptr()) % 16 == 0, "scores must be aligned to 16 bytes");
  return {scores, first_row, first_column, scores.size(0) * scores.size(1), scores.size(0) * columns};
}

TdroTile tile_of(const Place& place, const Masks& masks) {
  const Tensor& scores = place.scores;
  STD_TORCH_CHECK(masks.query_group.has_value() == masks.document_group.has_value(),
                  "query_group and document_group go together: give both or none");
  STD_TORCH_CHECK(masks.column_ids || !(masks.positive_ids || masks.known_ids),
                  "positive_ids and known_ids are looked up in column_ids: give column_ids too");
  const auto of_rows = [&](const char* name, const MaybeTensor& tensor) {
    return items<int64_t>(name, tensor, scores, place.first_row, place.rows);
  };
  const auto of_columns = [&](const char* name, const MaybeTensor& tensor) {
    return items<int64_t>(name, tensor, scores, place.first_column, place.columns);
  };
  TdroTile tile{};
  tile.scores = items<float>("scores", scores, scores, 0, scores.numel());
  tile.groups = scores.size(0), tile.rows = scores.size(1), tile.stride = scores.size(2);
  tile.columns = tile.groups ? place.columns / tile.groups : 0;
  tile.first_column = place.first_column;
  tile.temperature = items<float>("temperature", masks.temperature, scores, 0, 1);
  tile.positives = items<int64_t>("positives", masks.positives, scores, place.first_row, place.rows);
  tile.query_group = of_rows("query_group", masks.query_group);
  tile.document_group = of_columns("document_group", masks.document_group);
  tile.column_ids = of_columns("column_ids", masks.column_ids);
  tile.positive_ids = of_rows("positive_ids", masks.positive_ids);
  tile.num_known = masks.known_ids ? masks.known_ids->size(1) : 0;
  tile.known_ids = items<int64_t>("known_ids", masks.known_ids, scores, place.first_row * tile.num_known,
                                  place.rows * tile.num_known);
  tile.limits = items<float>("limits", masks.limits, scores, place.first_row, place.rows);
  tile.log_weights = items<float>("log_weights", masks.log_weights, scores, place.first_column, place.columns);
  return tile;
}

#define MASK_PARAMETERS                                                                                     \
  Tensor temperature, Tensor positives, MaybeTensor query_group, MaybeTensor document_group,                \
      MaybeTensor column_ids, MaybeTensor positive_ids, MaybeTensor known_ids, MaybeTensor limits,          \
      MaybeTensor log_weights
#define MASK_ARGUMENTS                                                                                       \
  Masks {                                                                                                    \
    temperature, positives, query_group, document_group, column_ids, positive_ids, known_ids, limits, log_weights \
  }
#define MASK_SCHEMA                                                                                          \
  "int columns, int first_row, int first_column, Tensor temperature, Tensor positives, Tensor? query_group, " \
  "Tensor? document_group, Tensor? column_ids, Tensor? positive_ids, Tensor? known_ids, Tensor? limits, "     \
  "Tensor? log_weights"

void tile_row_statistics(Tensor scores, int64_t columns, int64_t first_row, int64_t first_column, MASK_PARAMETERS,
                         Tensor row_max, Tensor row_sum) {
  const Place place = place_of(scores, columns, first_row, first_column);
  const TdroTile tile = tile_of(place, MASK_ARGUMENTS);
  check(tdro_tile_row_statistics(&tile, items<float>("row_max", row_max, scores, first_row, place.rows),
                                 items<float>("row_sum", row_sum, scores, first_row, place.rows), stream_of(scores)));
}

void tile_column_statistics(Tensor scores, int64_t columns, int64_t first_row, int64_t first_column, MASK_PARAMETERS,
                            Tensor column_max, Tensor column_sum) {
  const Place place = place_of(scores, columns, first_row, first_column);
  const TdroTile tile = tile_of(place, MASK_ARGUMENTS);
  // Given back at the end, while the kernels may still run: the allocator lends it next to work of the same stream.
  Tensor scratch = torch::stable::new_empty(scores, {tdro_tile_column_scratch(&tile)});
  check(tdro_tile_column_statistics(&tile, static_cast<float*>(scratch.data_ptr()),
                                    items<float>("column_max", column_max, scores, first_column, place.columns),
                                    items<float>("column_sum", column_sum, scores, first_column, place.columns),
                                    stream_of(scores)));
}

void tile_gradient(Tensor scores, int64_t columns, int64_t first_row, int64_t first_column, MASK_PARAMETERS,
                   Tensor row_totals, Tensor row_factors, MaybeTensor column_totals, MaybeTensor column_factors,
                   MaybeTensor residuals, int64_t storage) {
  STD_TORCH_CHECK(column_totals.has_value() == column_factors.has_value(),
                  "column_totals and column_factors go together: give both or none");
  const Place place = place_of(scores, columns, first_row, first_column);
  const TdroTile tile = tile_of(place, MASK_ARGUMENTS);
  check(tdro_tile_gradient(&tile, items<float>("row_totals", row_totals, scores, first_row, place.rows),
                           items<float>("row_factors", row_factors, scores, first_row, place.rows),
                           items<float>("column_totals", column_totals, scores, first_column, place.columns),
                           items<float>("column_factors", column_factors, scores, first_column, place.columns),
                           items<float>("residuals", residuals, scores, first_row, place.rows), int(storage),
                           stream_of(scores)));
}

void tile_softmax(Tensor scores, int64_t columns, int64_t first_row, int64_t first_column, MASK_PARAMETERS,
                  Tensor positive_scores, Tensor row_weights, Tensor losses, MaybeTensor residuals, int64_t storage) {
  const Place place = place_of(scores, columns, first_row, first_column);
  const TdroTile tile = tile_of(place, MASK_ARGUMENTS);
  check(tdro_tile_softmax(&tile, items<float>("positive_scores", positive_scores, scores, first_row, place.rows),
                          items<float>("row_weights", row_weights, scores, first_row, place.rows),
                          items<float>("losses", losses, scores, first_row, place.rows),
                          items<float>("residuals", residuals, scores, first_row, place.rows), int(storage),
                          stream_of(scores)));
}

TdroPositives sides_of(const Tensor& queries, const Tensor& documents, const Tensor& positives) {
  STD_TORCH_CHECK(queries.dim() == 2 && documents.dim() == 2 && queries.size(1) == documents.size(1),
                  "queries and documents must be [rows, width] and [columns, width]");
  STD_TORCH_CHECK(queries.is_contiguous() && documents.is_contiguous(),
                  "queries or documents are not contiguous; call .contiguous() on them");
  STD_TORCH_CHECK(queries.scalar_type() == documents.scalar_type(), "queries and documents must be of one type");
  const ScalarType type = queries.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "embeddings must be float32, bfloat16 or float16");
  const int storage = type == ScalarType::Float      ? TDRO_FLOAT32
                      : type == ScalarType::BFloat16 ? TDRO_BFLOAT16
                                                     : TDRO_FLOAT16;
  const int64_t rows = queries.size(0);
  return {queries.data_ptr(), documents.data_ptr(), rows, documents.size(0), queries.size(1), storage,
          items<int64_t>("positives", positives, queries, 0, rows)};
}

void tile_positive_scores(Tensor queries, Tensor documents, Tensor positives, Tensor temperature, Tensor scores) {
  const TdroPositives sides = sides_of(queries, documents, positives);
  check(tdro_positive_scores(&sides, items<float>("temperature", temperature, queries, 0, 1),
                             items<float>("scores", scores, queries, 0, sides.rows), stream_of(queries)));
}

void tile_add_positives(Tensor queries, Tensor documents, Tensor positives, Tensor query_factors,
                        Tensor document_factors, Tensor order, Tensor query_gradient, Tensor document_gradient) {
  const TdroPositives sides = sides_of(queries, documents, positives);
  check(tdro_add_positives(
      &sides, items<float>("query_factors", query_factors, queries, 0, sides.rows),
      items<float>("document_factors", document_factors, queries, 0, sides.rows),
      items<int64_t>("order", order, queries, 0, sides.rows),
      items<float>("query_gradient", query_gradient, queries, 0, queries.numel()),
      items<float>("document_gradient", document_gradient, queries, 0, documents.numel()), stream_of(queries)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TDRO_TILE_NAMESPACE, library) {
  library.def("tile_row_statistics(Tensor scores, " MASK_SCHEMA ", Tensor(a!) row_max, Tensor(b!) row_sum) -> ()");
  library.def("tile_column_statistics(Tensor scores, " MASK_SCHEMA ", Tensor(a!) column_max, Tensor(b!) column_sum) "
              "-> ()");
  library.def("tile_gradient(Tensor(a!) scores, " MASK_SCHEMA ", Tensor row_totals, Tensor row_factors, "
              "Tensor? column_totals, Tensor? column_factors, Tensor(b!)? residuals, int storage) -> ()");
  library.def("tile_softmax(Tensor(a!) scores, " MASK_SCHEMA ", Tensor positive_scores, Tensor row_weights, "
              "Tensor(b!) losses, Tensor(c!)? residuals, int storage) -> ()");
  library.def("tile_positive_scores(Tensor queries, Tensor documents, Tensor positives, Tensor temperature, "
              "Tensor(a!) scores) -> ()");
  library.def("tile_add_positives(Tensor queries, Tensor documents, Tensor positives, Tensor query_factors, "
              "Tensor document_factors, Tensor order, Tensor(a!) query_gradient, Tensor(b!) document_gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TDRO_TILE_NAMESPACE, TDRO_TILE_DEVICE, library) {
  library.impl("tile_row_statistics", TORCH_BOX(&tile_row_statistics));
  library.impl("tile_column_statistics", TORCH_BOX(&tile_column_statistics));
  library.impl("tile_gradient", TORCH_BOX(&tile_gradient));
  library.impl("tile_softmax", TORCH_BOX(&tile_softmax));
  library.impl("tile_positive_scores", TORCH_BOX(&tile_positive_scores));
  library.impl("tile_add_positives", TORCH_BOX(&tile_add_positives));
}
#endif  // WITH_CUDA
