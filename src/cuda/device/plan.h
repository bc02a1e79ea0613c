// How a product is done on a device: families of kernels offer plans for a call, the cheapest runs. A plan is data, and can be printed.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device.h"

namespace bnb::cuda {

struct Plan {
  int family = 0;         // of the product's families
  int config = 0;         // of the family's configurations
  int splits = 1;         // parts of k that are added in a second pass
  int64_t panel = 0;      // rows of W that are decoded at once
  int64_t workspace = 0;  // bytes
  double clocks = 0;      // estimated time (cost.h)
  std::string (*describe)(const Plan&) = nullptr;
};

// A family of kernels. `offer` adds a plan for each of its configurations that can do the call.
template <class Call> struct Family {
  const char* name;
  void (*offer)(const Call&, const dev::Device&, std::vector<Plan>&);
  void (*run)(const Plan&, const Call&, void* workspace, Stream);
};
template <class Call, size_t n> using Families = const Family<Call>* const[n];

// All plans that can do the call, the cheapest first. `one_family`: those of the first family that has any.
template <class Call, size_t n>
std::vector<Plan> offered_plans(const Families<Call, n>& families, const Call& call, const dev::Device& device, bool one_family = false) {
  std::vector<Plan> all;
  all.reserve(16);
  for (size_t i = 0; i < n; ++i) {
    const size_t first = all.size();
    if (one_family && first > 0) break;
    families[i]->offer(call, device, all);
    for (size_t j = first; j < all.size(); ++j) all[j].family = static_cast<int>(i);
  }
  std::ranges::stable_sort(all, {}, &Plan::clocks);
  return all;
}

// "tile, 64 x 128 x 64, .., about 12345 clocks"
template <class Call, size_t n> std::string describe_plan(const Families<Call, n>& families, const Plan& p) {
  return std::string(families[p.family]->name) + ", " + p.describe(p) + ", about " + std::to_string(static_cast<int64_t>(p.clocks)) +
         " clocks";
}

// Calls f.operator()<configs[index]>(): a configuration of run time as one of compile time.
template <const auto& configs, class F> void with_config(int index, F&& f) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((index == static_cast<int>(i) ? f.template operator()<configs[i]>() : void()), ...);
  }(std::make_index_sequence<std::size(configs)>());
}

}  // namespace bnb::cuda
