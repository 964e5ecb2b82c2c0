// What the CPU implementation of grouped InfoNCE takes and gives. Knows nothing of torch.
//
// Notation of docs/loss.md: s_ic = q_i . d_c / T + log weight of c; N_i = the columns that count as negatives of row i.
#pragma once

#include <cstdint>
#include <functional>

namespace tdro {

enum class Type { float32, bfloat16, float16 };

// Work in parallel: calls body(task, thread) for every task in [0, tasks); thread < threads.
struct Parallel {
  int threads;
  std::function<void(int64_t tasks, const std::function<void(int64_t task, int thread)>& body)> run;
};

struct Problem {
  Type type;
  int64_t rows, columns, width;
  const void* queries;          // [rows, width]
  const void* documents;        // [columns, width]
  const int64_t* positives;     // [rows]; outside [0, columns) = not among these columns
  float temperature;
  const int64_t* query_group;   // [rows] or null; null = every column meets every row
  const int64_t* document_group;  // [columns] or null
  const int64_t* column_ids;    // [columns] or null
  const int64_t* positive_ids;  // [rows] or null: a column with this id is no negative
  const int64_t* known_ids;     // [rows, known] or null, -1 = none: nor is a column with one of these ids
  int64_t known;
  bool has_margin;
  float margin;                 // columns above q . positive - margin are no negatives
  const float* log_weights;     // [columns] or null
  int64_t workspace;            // bytes that may be used beside the results, about: more of them save work
};

// logsumexp over N_i, and with column_negatives over the rows that have a column as a negative. -inf = none.
void forward(const Problem& problem, const Parallel& parallel, const float* positive_scores, double* row_negatives,
             double* column_negatives);

// Either gradient may be null in all that follows: it is not computed.
//
// Gradients of all pairs (i, c): P_ic = row_factors_i exp(s_ic - row_totals_i) [+ the same by columns], and
// positive_factors_i at the positive; query_gradient = P D / T, document_gradient = P^T Q / T.
struct Shares {
  const float *positive_scores, *row_totals, *row_factors, *positive_factors;  // [rows]
  const float *column_totals, *column_factors;                                 // [columns] or null
};
void backward(const Problem& problem, const Parallel& parallel, const Shares& shares, float* query_gradient,
              float* document_gradient);

// Row losses whose weights come later. Into what `room_for` gives it keeps exponentials for the gradients, no more than
// fit the memory of a call. Null = none.
using RoomFor = std::function<float*(int64_t floats)>;
void losses(const Problem& problem, const Parallel& parallel, const float* positive_scores, float* losses,
            const RoomFor& room_for);

// Gradients of sum(row_weights * losses) after the above, by three matrix products in all for what was kept, else four.
void losses_backward(const Problem& problem, const Parallel& parallel, const float* positive_scores,
                     const float* losses, const float* row_weights, const float* kept, int64_t kept_floats,
                     float* query_gradient, float* document_gradient);

// Row losses and the gradients of sum(row_weights * losses) in one go: three matrix products, or four where the
// exponentials of 32 rows do not fit the workspace.
void forward_backward(const Problem& problem, const Parallel& parallel, const float* positive_scores,
                      const float* row_weights, float* losses, float* query_gradient, float* document_gradient);

// q_i . d_positive(i) / T; 0 where the positive is not among the columns.
void positive_scores(const Problem& problem, const Parallel& parallel, float* scores);

// Which instructions are used here: "avx512+bf16", "avx512", "avx2" or "generic".
const char* cpu_path();

}  // namespace tdro
