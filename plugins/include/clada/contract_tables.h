// SPDX-License-Identifier: Apache-2.0
// The contract of com.clada::SparseFFN, version 1, as data. clada/contract.h checks nodes by it.
//
// Made from plugins/sparse_ffn.yaml by `make contract`. Change that file, and run it again; do not edit this one.
#ifndef CLADA_CONTRACT_TABLES_H_
#define CLADA_CONTRACT_TABLES_H_

#include <cstdint>

namespace clada {

inline constexpr char kDomain[] = "com.clada";
inline constexpr char kOpName[] = "SparseFFN";
inline constexpr int kOpVersion = 1;
inline constexpr char kOpVersionText[] = "1";
inline constexpr int kShadowBlock = 32;  // weights that share one (scale, offset) pair

// Types of w_in and w_out.
enum class FloatType { kFloat32, kFloat16, kBFloat16 };

// Types of all tensors. Those of weights come first, with the numbers that they have in FloatType.
enum class ElementType { kFloat32, kFloat16, kBFloat16, kInt8, kUint8, kInt32, kOther };
inline constexpr const char* kElementTypeNames[] = {"float32", "float16", "bfloat16", "int8", "uint8", "int32", "another type"};

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity };
inline constexpr const char* kActivationNames[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};

enum class WeightFormat { kPlain, kInt4, kInt5, kInt6, kInt8 };
inline constexpr const char* kWeightFormatNames[] = {"plain", "int4", "int5", "int6", "int8"};

enum class Score { kGate, kExact, kShadow, kPrefix, kExternal };
inline constexpr const char* kScoreNames[] = {"gate", "exact", "shadow", "prefix", "external"};

enum class Rule { kThreshold, kRelative, kTopk };
inline constexpr const char* kRuleNames[] = {"threshold", "relative", "topk"};

enum class Combine { kSum, kWeighted };
inline constexpr const char* kCombineNames[] = {"sum", "weighted"};

enum class StatNorm { kRow, kNone };
inline constexpr const char* kStatNormNames[] = {"row", "none"};

struct Attributes {
  Activation activation = Activation::kSilu;
  bool gated = true;
  WeightFormat weight_format = WeightFormat::kPlain;
  Score score = Score::kGate;
  Rule rule = Rule::kThreshold;
  int64_t granule = 1;
  Combine combine = Combine::kSum;
  float load_slope = 0.0f;
  float load_min = 0.25f;
  float load_max = 4.0f;
  bool use_stat = false;
  float backbone_min = 0.0f;
  float prior_gamma = 0.0f;
  bool emit_stat = false;
  StatNorm stat_norm = StatNorm::kRow;
  bool emit_active = false;
  bool has_bias = false;
};

// Hands each attribute to `visit`, in the contract's order: visit.Choice(name, value, names), or .Flag, .Int or
// .Float(name, value). `Values` is Attributes, or const Attributes.
template <class Values, class Visitor>
void VisitAttributes(Values& a, Visitor& visit) {
  visit.Choice("activation", a.activation, kActivationNames);
  visit.Flag("gated", a.gated);
  visit.Choice("weight_format", a.weight_format, kWeightFormatNames);
  visit.Choice("score", a.score, kScoreNames);
  visit.Choice("rule", a.rule, kRuleNames);
  visit.Int("granule", a.granule);
  visit.Choice("combine", a.combine, kCombineNames);
  visit.Float("load_slope", a.load_slope);
  visit.Float("load_min", a.load_min);
  visit.Float("load_max", a.load_max);
  visit.Flag("use_stat", a.use_stat);
  visit.Float("backbone_min", a.backbone_min);
  visit.Float("prior_gamma", a.prior_gamma);
  visit.Flag("emit_stat", a.emit_stat);
  visit.Choice("stat_norm", a.stat_norm, kStatNormNames);
  visit.Flag("emit_active", a.emit_active);
  visit.Flag("has_bias", a.has_bias);
}

// Calls fail(parts...) with a message in pieces (texts, values) for each constraint that the attributes break.
template <class Fail>
void CheckConstraints(const Attributes& a, const Fail& fail) {
  if (!(a.granule >= 1 && a.granule < 2147483648))
    fail("attribute 'granule' is ", a.granule, "; it must be at least 1 and below 2^31");
  if (!(a.load_min > 0.0f && a.load_max > 0.0f && a.load_min <= a.load_max))
    fail("load_min is ", a.load_min, " and load_max is ", a.load_max, "; 0 < load_min <= load_max is needed");
  if (!(a.backbone_min >= 0.0f && a.prior_gamma >= 0.0f))
    fail("backbone_min is ", a.backbone_min, " and prior_gamma is ", a.prior_gamma, "; neither may be negative");
  if ((a.score == Score::kPrefix || a.backbone_min > 0.0f || a.prior_gamma > 0.0f) && !a.use_stat)
    fail("score 'prefix', backbone_min and prior_gamma need use_stat = 1; use_stat is ", a.use_stat);
  if (a.combine == Combine::kWeighted && a.score != Score::kExternal)
    fail("combine 'weighted' needs score 'external'; score is '", kScoreNames[static_cast<int>(a.score)], "'");
  if (a.weight_format != WeightFormat::kPlain && !(a.score == Score::kExact && a.granule == 1))
    fail("weight_format '", kWeightFormatNames[static_cast<int>(a.weight_format)],
    "' needs score 'exact' and granule 1; score is '", kScoreNames[static_cast<int>(a.score)], "' and granule ", a.granule);
  if (a.weight_format != WeightFormat::kPlain && !(!a.use_stat && !a.emit_stat))
    fail("weight_format '", kWeightFormatNames[static_cast<int>(a.weight_format)], "' has no statistic; use_stat is ",
    a.use_stat, " and emit_stat ", a.emit_stat);
}

// The type of a tensor: W, the one that both weights have; X, float32 or W; or always the same.
enum class TypeRule { kW, kX, kFixed };

// A size of a shape: an axis of a call, or a number. kRows stands for all axes of x but the last.
enum class Size { kRows, kB, kD, kF, kN, kE, kT, kR, kQ, kNumber };
struct Axis {
  constexpr Axis(Size of = Size::kNumber, int64_t by = 1) : size(of), number(by) {}
  Size size;
  int64_t number;  // what the size is divided by; of kNumber, the number
};
constexpr int kMaxAxes = 4, kMaxShapes = 2;
struct TensorShape {
  int rank = 0;
  Axis axes[kMaxAxes] = {};
};
struct TensorInfo {
  const char* name;
  TypeRule rule;
  ElementType type;  // of kFixed
  int shape_count;
  TensorShape shapes[kMaxShapes];
};

enum class Input { kX, kLoad, kWIn, kWOut, kThreshold, kNeuronScale, kShadow, kShadowScale, kScore, kPastStat, kGateBias,
    kUpBias, kDownBias };
inline constexpr Input kAllInputs[] = {Input::kX, Input::kLoad, Input::kWIn, Input::kWOut, Input::kThreshold,
    Input::kNeuronScale, Input::kShadow, Input::kShadowScale, Input::kScore, Input::kPastStat, Input::kGateBias, Input::kUpBias,
    Input::kDownBias};
inline constexpr TensorInfo kInputInfo[] = {
    {"x", TypeRule::kX, ElementType::kOther, 1, {{2, {Size::kRows, Size::kD}}}},
    {"load", TypeRule::kFixed, ElementType::kFloat32, 1, {{1, {Size::kRows}}}},
    {"w_in", TypeRule::kW, ElementType::kOther, 1, {{3, {Size::kF, Size::kN, Size::kD}}}},
    {"w_out", TypeRule::kW, ElementType::kOther, 1, {{2, {Size::kF, Size::kD}}}},
    {"threshold", TypeRule::kFixed, ElementType::kFloat32, 2, {{1, {{Size::kNumber, 1}}}, {1, {Size::kE}}}},
    {"neuron_scale", TypeRule::kFixed, ElementType::kFloat32, 1, {{1, {Size::kF}}}},
    {"shadow", TypeRule::kFixed, ElementType::kInt8, 1, {{3, {Size::kF, Size::kN, {Size::kD, 2}}}}},
    {"shadow_scale", TypeRule::kFixed, ElementType::kFloat16, 1, {{4, {Size::kF, Size::kN, {Size::kD, 32}, {Size::kNumber, 2}}}}},
    {"score", TypeRule::kFixed, ElementType::kFloat32, 2, {{2, {Size::kRows, Size::kE}}, {2, {Size::kB, Size::kE}}}},
    {"past_stat", TypeRule::kFixed, ElementType::kFloat32, 1, {{2, {Size::kB, Size::kF}}}},
    {"gate_bias", TypeRule::kFixed, ElementType::kFloat32, 1, {{1, {Size::kF}}}},
    {"up_bias", TypeRule::kFixed, ElementType::kFloat32, 1, {{1, {Size::kF}}}},
    {"down_bias", TypeRule::kFixed, ElementType::kFloat32, 1, {{1, {Size::kD}}}},
};
constexpr const TensorInfo& Info(Input input) { return kInputInfo[static_cast<int>(input)]; }

// Whether a node with these attributes has the input.
constexpr bool Has(const Attributes& a, Input input) {
  switch (input) {
    case Input::kNeuronScale: return a.score == Score::kExact || a.score == Score::kShadow;
    case Input::kShadow: return a.score == Score::kShadow;
    case Input::kShadowScale: return a.score == Score::kShadow;
    case Input::kScore: return a.score == Score::kExternal;
    case Input::kPastStat: return a.use_stat;
    case Input::kGateBias: return a.has_bias && a.gated;
    case Input::kUpBias: return a.has_bias;
    case Input::kDownBias: return a.has_bias;
    default: return true;
  }
}

// Where the inputs of a call lie; null where there is none.
struct InputPointers {
  const void* x = nullptr;                 // X [rows, d]
  const float* load = nullptr;             // float32 [rows]
  const void* w_in = nullptr;              // W [f, n, d]
  const void* w_out = nullptr;             // W [f, d]
  const float* threshold = nullptr;        // float32 [1] or [E]
  const float* neuron_scale = nullptr;     // float32 [f]
  const uint8_t* shadow = nullptr;         // int8 [f, n, d/2]
  const uint16_t* shadow_scale = nullptr;  // float16 [f, n, d/32, 2]
  const float* score = nullptr;            // float32 [rows, E] or [B, E]
  const float* past_stat = nullptr;        // float32 [B, f]
  const float* gate_bias = nullptr;        // float32 [f]
  const float* up_bias = nullptr;          // float32 [f]
  const float* down_bias = nullptr;        // float32 [d]
};
inline void SetInput(InputPointers& p, Input input, const void* data) {
  switch (input) {
    case Input::kX: p.x = data; return;
    case Input::kLoad: p.load = static_cast<const float*>(data); return;
    case Input::kWIn: p.w_in = data; return;
    case Input::kWOut: p.w_out = data; return;
    case Input::kThreshold: p.threshold = static_cast<const float*>(data); return;
    case Input::kNeuronScale: p.neuron_scale = static_cast<const float*>(data); return;
    case Input::kShadow: p.shadow = static_cast<const uint8_t*>(data); return;
    case Input::kShadowScale: p.shadow_scale = static_cast<const uint16_t*>(data); return;
    case Input::kScore: p.score = static_cast<const float*>(data); return;
    case Input::kPastStat: p.past_stat = static_cast<const float*>(data); return;
    case Input::kGateBias: p.gate_bias = static_cast<const float*>(data); return;
    case Input::kUpBias: p.up_bias = static_cast<const float*>(data); return;
    case Input::kDownBias: p.down_bias = static_cast<const float*>(data); return;
  }
}

// The first inputs, and the first outputs, which every node has.
inline constexpr int kRequiredInputs = 5;
inline constexpr int kRequiredOutputs = 1;

enum class Output { kY, kStat, kActive };
inline constexpr Output kAllOutputs[] = {Output::kY, Output::kStat, Output::kActive};
inline constexpr TensorInfo kOutputInfo[] = {
    {"y", TypeRule::kX, ElementType::kOther, 1, {{2, {Size::kRows, Size::kD}}}},
    {"stat", TypeRule::kFixed, ElementType::kFloat32, 1, {{2, {Size::kB, Size::kF}}}},
    {"active", TypeRule::kFixed, ElementType::kInt32, 1, {{1, {Size::kRows}}}},
};
constexpr const TensorInfo& Info(Output output) { return kOutputInfo[static_cast<int>(output)]; }

// Whether a node with these attributes has the output.
constexpr bool Has(const Attributes& a, Output output) {
  switch (output) {
    case Output::kStat: return a.emit_stat;
    case Output::kActive: return a.emit_active;
    default: return true;
  }
}

// Where the outputs of a call lie; null where there is none.
struct OutputPointers {
  void* y = nullptr;          // X [rows, d]
  float* stat = nullptr;      // float32 [B, f]
  int32_t* active = nullptr;  // int32 [rows]
};
inline void SetOutput(OutputPointers& p, Output output, void* data) {
  switch (output) {
    case Output::kY: p.y = data; return;
    case Output::kStat: p.stat = static_cast<float*>(data); return;
    case Output::kActive: p.active = static_cast<int32_t*>(data); return;
  }
}

// Whether the first of the input's shapes is the only one with these attributes.
constexpr bool OnlyFirstShape(const Attributes& a, Input input) {
  switch (input) {
    case Input::kThreshold: return a.rule == Rule::kTopk;
    default: return false;
  }
}

// The type and shapes that an input has with these attributes.
inline constexpr TensorInfo kWInInstead =
    {"w_in", TypeRule::kFixed, ElementType::kUint8, 1, {{3, {Size::kT, {Size::kD, 32}, Size::kR}}}};
inline constexpr TensorInfo kWOutInstead =
    {"w_out", TypeRule::kFixed, ElementType::kUint8, 1, {{2, {{Size::kF, 32}, Size::kQ}}}};
constexpr const TensorInfo& Info(const Attributes& a, Input input) {
  switch (input) {
    case Input::kWIn: return a.weight_format == WeightFormat::kPlain ? Info(input) : kWInInstead;
    case Input::kWOut: return a.weight_format == WeightFormat::kPlain ? Info(input) : kWOutInstead;
    default: return Info(input);
  }
}

}  // namespace clada

#endif  // CLADA_CONTRACT_TABLES_H_
