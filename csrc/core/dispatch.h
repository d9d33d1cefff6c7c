// Ops that other ops call, by way of the dispatcher: of whatever backend and mode the arguments are.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace quantize {

// Looked up by name and checked against its schema: to be kept in a static variable.
template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace quantize
