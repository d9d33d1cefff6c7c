// Integers on their way from a forward to its backward: all of a node's in one entry of its saved_data, in the order they were put. An
// entry for each would be a search and some allocations more, in every layer of every step.
#pragma once

#include <c10/core/SymIntArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>
#include <vector>

namespace quantize {

class NumberWriter {
 public:
  explicit NumberWriter(torch::autograd::AutogradContext* ctx) : ctx_(ctx) { numbers_.reserve(24); }
  NumberWriter(const NumberWriter&) = delete;
  NumberWriter& operator=(const NumberWriter&) = delete;

  NumberWriter& put(c10::SymInt number) {
    numbers_.push_back(std::move(number));
    return *this;
  }

  // How many there are, and these.
  template <typename T>
  NumberWriter& put_list(c10::ArrayRef<T> numbers) {
    numbers_.emplace_back(int64_t(numbers.size()));
    numbers_.insert(numbers_.end(), numbers.begin(), numbers.end());
    return *this;
  }

  // After the last one.
  void save() { ctx_->saved_data["numbers"] = c10::SymIntArrayRef(numbers_); }

 private:
  torch::autograd::AutogradContext* ctx_;
  std::vector<c10::SymInt> numbers_;
};

// Reads what a NumberWriter put, in the same order.
class NumberReader {
 public:
  explicit NumberReader(torch::autograd::AutogradContext* ctx) : numbers_(ctx->saved_data.at("numbers").toListRef()) {}

  c10::SymInt get() { return numbers_[next_++].toSymInt(); }
  int64_t get_int() { return numbers_[next_++].toInt(); }
  bool get_bool() { return get_int() != 0; }

  c10::SymDimVector get_list() {
    const int64_t count = get_int();
    c10::SymDimVector list(count);
    for (c10::SymInt& number : list) number = get();
    return list;
  }

  std::vector<int64_t> get_ints() {
    const int64_t count = get_int();
    std::vector<int64_t> list(count);
    for (int64_t& number : list) number = get_int();
    return list;
  }

 private:
  c10::ArrayRef<c10::IValue> numbers_;
  size_t next_ = 0;
};

}  // namespace quantize
