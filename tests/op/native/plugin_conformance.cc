// SPDX-License-Identifier: Apache-2.0
// Does with a plugin library what TensorRT does with it, from loading it to running a layer, without TensorRT: on a GPU, or on
// the CPU with the emulated CUDA runtime.
//
//   plugin_conformance LIBRARY --fields     prints the names and types of the creator's fields
//   plugin_conformance LIBRARY FOLDER       runs each FOLDER/*.case and writes a .result beside it
//
// A case and a result are lines of text up to the line `end`, then the tensors' bytes in the order of their lines. Case:
//   node NAME | creator NAME VERSION NAMESPACE | field NAME TYPE VALUE... | input NAME TYPE OPEN RANK SIZES...
// OPEN is the number of leading axes that an engine would leave open. Result:
//   status ok | status STEP TEXT... | log SEVERITY TEXT... | output NAME TYPE RANK SIZES...
// The program itself fails only when it can't do its work; what a plugin refuses is a result.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

struct Failure : std::runtime_error {
  Failure(const char* at, const std::string& what) : std::runtime_error(what), step(at) {}
  const char* step;
};

void Want(bool good, const char* step, const std::string& what) {
  if (!good) throw Failure(step, what);
}

void Cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

struct TypeInfo {
  const char* name;
  DataType type;
  size_t bytes;
};
constexpr TypeInfo kTypes[] = {{"float32", DataType::kFLOAT, 4}, {"float16", DataType::kHALF, 2}, {"bfloat16", DataType::kBF16, 2},
                               {"int8", DataType::kINT8, 1},     {"int32", DataType::kINT32, 4},  {"int64", DataType::kINT64, 8}};

const TypeInfo& FindType(const std::string& name) {
  for (const TypeInfo& info : kTypes)
    if (name == info.name) return info;
  throw std::runtime_error("unknown type " + name);
}

const TypeInfo& FindType(DataType type) {
  for (const TypeInfo& info : kTypes)
    if (type == info.type) return info;
  throw Failure("types", "an output has TensorRT type " + std::to_string(static_cast<int>(type)));
}

struct Tensor {
  std::string name;
  const TypeInfo* type = nullptr;
  int open = 0;
  std::vector<int64_t> shape;
  std::vector<char> data;

  size_t Bytes() const {
    size_t bytes = type->bytes;
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    return bytes;
  }
};

struct Field {
  std::string name, type;
  std::vector<int32_t> ints;
  std::vector<int64_t> longs;
  std::vector<float> floats;
  std::string text;

  PluginField View() const {
    const auto count = [](const auto& values) { return static_cast<int32_t>(values.size()); };
    if (type == "int") return {name.c_str(), ints.data(), PluginFieldType::kINT32, count(ints)};
    if (type == "int64") return {name.c_str(), longs.data(), PluginFieldType::kINT64, count(longs)};
    if (type == "float") return {name.c_str(), floats.data(), PluginFieldType::kFLOAT32, count(floats)};
    return {name.c_str(), text.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size() + 1)};  // as the parser does
  }
};

struct Case {
  std::string node, name, version, name_space;
  std::deque<Field> fields;
  std::vector<Tensor> inputs;
};

template <class T>
std::vector<T> Rest(std::istream& line) {
  std::vector<T> values;
  std::string word;
  while (line >> word) values.push_back(static_cast<T>(std::is_integral_v<T> ? std::stoll(word) : std::stod(word)));
  return values;
}

Case ReadCase(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  Case made;
  std::string text;
  while (std::getline(file, text) && text != "end") {
    std::istringstream line(text);
    std::string word;
    line >> word;
    if (word == "node") {
      line >> made.node;
    } else if (word == "creator") {
      line >> made.name >> made.version >> made.name_space;
    } else if (word == "field") {
      Field& field = made.fields.emplace_back();
      line >> field.name >> field.type;
      if (field.type == "int") field.ints = Rest<int32_t>(line);
      else if (field.type == "int64") field.longs = Rest<int64_t>(line);
      else if (field.type == "float") field.floats = Rest<float>(line);
      else line >> field.text;
    } else if (word == "input") {
      Tensor& tensor = made.inputs.emplace_back();
      int rank = 0;
      line >> tensor.name >> word >> tensor.open >> rank;
      tensor.type = &FindType(word);
      tensor.shape = Rest<int64_t>(line);
      if (static_cast<int>(tensor.shape.size()) != rank) throw std::runtime_error(path.string() + ": bad line: " + text);
    } else {
      throw std::runtime_error(path.string() + ": unknown line: " + text);
    }
  }
  for (Tensor& tensor : made.inputs) {
    tensor.data.resize(tensor.Bytes());
    file.read(tensor.data.data(), static_cast<std::streamsize>(tensor.data.size()));
  }
  if (!file) throw std::runtime_error(path.string() + " is cut off");
  return made;
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

class Log final : public ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    lines.push_back(std::to_string(static_cast<int>(severity)) + " " + OneLine(text));
  }
  std::vector<std::string> lines;
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &log; }
  Log log;
};

// Sizes as the builder shows them: open ones have a value that the plugin can't see.
class Size final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  Size(int64_t size, bool is_open) : value(size), open(is_open) { mImpl = this; }
  bool isConstant() const override { return !open; }
  int64_t getConstantValue() const override { return open ? std::numeric_limits<int64_t>::min() : value; }
  bool isSizeTensor() const override { return false; }
  const int64_t value;
  const bool open;
};

class Builder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* Make(int64_t value, bool open) { return &sizes_.emplace_back(value, open); }
  const IDimensionExpr* constant(int64_t value) override { return Make(value, false); }
  const IDimensionExpr* operation(DimensionOperation kind, const IDimensionExpr& a, const IDimensionExpr& b) override {
    const auto &left = static_cast<const Size&>(a), &right = static_cast<const Size&>(b);
    const bool open = left.open || right.open;
    switch (kind) {
      case DimensionOperation::kSUM: return Make(left.value + right.value, open);
      case DimensionOperation::kPROD: return Make(left.value * right.value, open);
      case DimensionOperation::kSUB: return Make(left.value - right.value, open);
      case DimensionOperation::kMAX: return Make(std::max(left.value, right.value), open);
      case DimensionOperation::kMIN: return Make(std::min(left.value, right.value), open);
      default: return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }

 private:
  std::deque<Size> sizes_;
};

constexpr size_t kGuard = 256;

// Device memory with a margin on both sides that nobody may touch.
class Buffer {
 public:
  Buffer(size_t bytes, cudaStream_t stream) : bytes_(bytes) {
    Cuda(cudaMalloc(reinterpret_cast<void**>(&memory_), Whole()), "cudaMalloc");
    Cuda(cudaMemsetAsync(memory_, 0xa5, Whole(), stream), "cudaMemsetAsync");
    Cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return memory_ + kGuard; }
  void Fill(int value, cudaStream_t stream) { Cuda(cudaMemsetAsync(data(), value, bytes_, stream), "cudaMemsetAsync"); }
  void Write(const std::vector<char>& from) {
    if (bytes_) Cuda(cudaMemcpy(data(), from.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void CheckMargins(const std::string& name) const {
    Want(Intact(0, kGuard), "bounds", "something was written before " + name);
    Want(Intact(kGuard + bytes_, Whole()), "bounds", "something was written behind " + name);
  }
  std::vector<char> Read(const std::string& name) const {
    CheckMargins(name);
    return Copy(kGuard, kGuard + bytes_);
  }

 private:
  size_t Whole() const { return (bytes_ + kGuard - 1) / kGuard * kGuard + 2 * kGuard; }
  std::vector<char> Copy(size_t from, size_t to) const {
    std::vector<char> copy(to - from);
    if (from < to) Cuda(cudaMemcpy(copy.data(), memory_ + from, to - from, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }
  bool Intact(size_t from, size_t to) const {
    const std::vector<char> margin = Copy(from, to);
    return std::all_of(margin.begin(), margin.end(), [](char byte) { return byte == static_cast<char>(0xa5); });
  }
  size_t bytes_;
  char* memory_ = nullptr;
};

int64_t Largest(int64_t size) { return 2 * size + 1; }

// The tensor at a call (`call`), and at the corners of a profile.
struct Description {
  PluginTensorDesc call{}, largest{};
  DynamicPluginTensorDesc profile{};
};

Description Describe(const Tensor& tensor) {
  Description made;
  PluginTensorDesc& desc = made.call;
  desc.type = tensor.type->type;
  desc.format = TensorFormat::kLINEAR;
  desc.scale = 1.0f;
  desc.dims.nbDims = static_cast<int32_t>(tensor.shape.size());
  std::copy(tensor.shape.begin(), tensor.shape.end(), desc.dims.d);
  made.largest = desc;
  made.profile.desc = desc;
  made.profile.min = made.profile.opt = desc.dims;
  for (int i = 0; i < tensor.open; ++i) {
    made.profile.desc.dims.d[i] = -1;
    made.profile.min.d[i] = std::min<int64_t>(desc.dims.d[i], 1);
    made.largest.dims.d[i] = Largest(desc.dims.d[i]);
  }
  made.profile.max = made.largest.dims;
  return made;
}

template <class T>
T* Capability(IPluginV3& plugin, PluginCapabilityType type, const char* name) {
  auto* found = static_cast<T*>(plugin.getCapabilityInterface(type));
  Want(found != nullptr, "create", std::string("the plugin has no capability ") + name);
  return found;
}

// Fields that outlive the plugin they came from, as in a serialised engine.
struct Saved {
  std::deque<std::string> names, values;
  std::vector<PluginField> fields;
  PluginFieldCollection collection;

  explicit Saved(const PluginFieldCollection* from) {
    Want(from != nullptr, "serialize", "getFieldsToSerialize gave nothing");
    for (int32_t i = 0; i < from->nbFields; ++i) {
      const PluginField& field = from->fields[i];
      const size_t element = field.type == PluginFieldType::kCHAR ? 1 : field.type == PluginFieldType::kINT64 ? 8 : 4;
      values.emplace_back(static_cast<const char*>(field.data), element * static_cast<size_t>(field.length));
      names.emplace_back(field.name);
      fields.emplace_back(names.back().c_str(), values.back().data(), field.type, field.length);
    }
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
  }
  bool operator==(const Saved& other) const { return names == other.names && values == other.values; }
};

using Plugin = std::unique_ptr<IPluginV3>;

IPluginCreatorV3One& FindCreator(const Case& one, IPluginCreatorInterface* const* creators, int32_t count) {
  std::string held;
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
    if (one.name == creator.getPluginName() && one.version == creator.getPluginVersion() &&
        one.name_space == creator.getPluginNamespace())
      return creator;
    held += std::string(held.empty() ? "" : ", ") + creator.getPluginNamespace() + "::" + creator.getPluginName() + " version " +
            creator.getPluginVersion();
  }
  throw Failure("creator", "no " + one.name_space + "::" + one.name + " version " + one.version + "; the library has " + held);
}

std::vector<Tensor> Run(const Case& one, IPluginCreatorV3One& creator) {
  std::vector<PluginField> views;
  for (const Field& field : one.fields) views.push_back(field.View());
  const PluginFieldCollection collection{static_cast<int32_t>(views.size()), views.data()};
  Plugin plugin(creator.createPlugin(one.node.c_str(), &collection, TensorRTPhase::kBUILD));
  Want(plugin != nullptr, "create", "createPlugin gave nothing");
  auto* core = Capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE, "core");
  Want(one.name == core->getPluginName() && one.version == core->getPluginVersion() &&
           one.name_space == core->getPluginNamespace(), "create", "the plugin has another name than its creator");

  // What the builder asks, of a clone of what the network holds.
  Plugin cloned(plugin->clone());
  Want(cloned != nullptr, "clone", "clone gave nothing");
  plugin.reset();
  auto* build = Capability<IPluginV3OneBuild>(*cloned, PluginCapabilityType::kBUILD, "build");
  const auto inputs = static_cast<int32_t>(one.inputs.size());
  const int32_t outputs = build->getNbOutputs();
  std::vector<DataType> input_types, output_types(outputs);
  for (const Tensor& input : one.inputs) input_types.push_back(input.type->type);
  Want(build->getOutputDataTypes(output_types.data(), outputs, input_types.data(), inputs) == 0, "types",
       "getOutputDataTypes failed");

  Builder builder;
  std::vector<DimsExprs> input_shapes, output_shapes(outputs);
  for (const Tensor& input : one.inputs) {
    DimsExprs& shape = input_shapes.emplace_back();
    shape.nbDims = static_cast<int32_t>(input.shape.size());
    for (int32_t i = 0; i < shape.nbDims; ++i) shape.d[i] = builder.Make(input.shape[i], i < input.open);
  }
  Want(build->getOutputShapes(input_shapes.data(), inputs, nullptr, 0, output_shapes.data(), outputs, builder) == 0, "shapes",
       "getOutputShapes failed");

  std::vector<Tensor> results;
  std::vector<Description> tensors;
  for (const Tensor& input : one.inputs) tensors.push_back(Describe(input));
  for (int32_t i = 0; i < outputs; ++i) {
    Tensor& result = results.emplace_back();
    result.name = std::to_string(i);
    result.type = &FindType(output_types[i]);
    for (int32_t axis = 0; axis < output_shapes[i].nbDims; ++axis) {
      const auto& size = static_cast<const Size&>(*output_shapes[i].d[axis]);
      result.shape.push_back(size.value);
      if (size.open && result.open == axis) ++result.open;
    }
    tensors.push_back(Describe(result));
  }
  std::vector<DynamicPluginTensorDesc> profiles;
  std::vector<PluginTensorDesc> calls, largest;
  for (const Description& tensor : tensors) {
    profiles.push_back(tensor.profile);
    calls.push_back(tensor.call);
    largest.push_back(tensor.largest);
  }
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    Want(build->supportsFormatCombination(i, profiles.data(), inputs, outputs), "formats",
         "supportsFormatCombination refuses tensor " + std::to_string(i));
    std::vector<DynamicPluginTensorDesc> other = profiles;
    other[i].desc.format = TensorFormat::kCHW32;
    Want(!build->supportsFormatCombination(i, other.data(), inputs, outputs), "formats",
         "supportsFormatCombination takes a blocked format for tensor " + std::to_string(i));
    other[i] = profiles[i];
    other[i].desc.type = DataType::kBOOL;
    Want(!build->supportsFormatCombination(i, other.data(), inputs, outputs), "formats",
         "supportsFormatCombination takes bool for tensor " + std::to_string(i));
  }
  Want(build->getNbTactics() == 0 && build->getFormatCombinationLimit() > 0, "configure", "tactics or formats are odd");
  Want(build->getTimingCacheID() != nullptr && build->getMetadataString() != nullptr, "configure", "no timing id, or metadata");
  Want(build->configurePlugin(profiles.data(), inputs, profiles.data() + inputs, outputs) == 0, "configure",
       "configurePlugin failed");
  const size_t workspace_bytes = build->getWorkspaceSize(profiles.data(), inputs, profiles.data() + inputs, outputs);

  // Into an engine, and out of it.
  const Saved saved(Capability<IPluginV3OneRuntime>(*cloned, PluginCapabilityType::kRUNTIME, "runtime")->getFieldsToSerialize());
  cloned.reset();
  const Plugin loaded(creator.createPlugin("(from an engine)", &saved.collection, TensorRTPhase::kRUNTIME));
  Want(loaded != nullptr, "deserialize", "createPlugin gave nothing for what getFieldsToSerialize gave");
  auto* unattached = Capability<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME, "runtime");
  Want(saved == Saved(unattached->getFieldsToSerialize()), "deserialize", "the fields changed on their way");
  const Plugin attached(unattached->attachToContext(nullptr));
  Want(attached != nullptr, "attach", "attachToContext gave nothing");
  auto* runtime = Capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME, "runtime");

  Want(runtime->setTactic(0) == 0, "attach", "setTactic(0) failed");
  for (const auto& shapes : {largest, calls})
    Want(runtime->onShapeChange(shapes.data(), inputs, shapes.data() + inputs, outputs) == 0, "shape_change",
         "onShapeChange failed");

  cudaStream_t stream;
  Cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  std::deque<Buffer> buffers;
  std::vector<const void*> in;
  std::vector<void*> out;
  for (const Tensor& input : one.inputs) {
    buffers.emplace_back(input.Bytes(), stream).Write(input.data);
    in.push_back(buffers.back().data());
  }
  for (const Tensor& result : results) out.push_back(buffers.emplace_back(result.Bytes(), stream).data());
  Buffer workspace(workspace_bytes, stream);
  // Twice: what memory held before must not matter, to the bit.
  for (const int garbage : {0xff, 0x00}) {
    workspace.Fill(garbage, stream);
    for (int32_t i = 0; i < outputs; ++i) buffers[inputs + i].Fill(garbage, stream);
    Want(runtime->enqueue(calls.data(), calls.data() + inputs, in.data(), out.data(), workspace.data(), stream) == 0, "enqueue",
         "enqueue failed");
    Cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    for (int32_t i = 0; i < outputs; ++i) {
      std::vector<char> found = buffers[inputs + i].Read("output " + std::to_string(i));
      Want(garbage != 0 || found == results[i].data, "repeat", "output " + std::to_string(i) + " differs in a second run");
      results[i].data = std::move(found);
    }
    workspace.CheckMargins("the workspace");
  }
  for (int32_t i = 0; i < inputs; ++i)
    Want(buffers[i].Read(one.inputs[i].name) == one.inputs[i].data, "bounds", "input '" + one.inputs[i].name + "' was changed");
  Cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return results;
}

template <class Function>
Function Symbol(void* library, const char* name) {
  void* const found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("the library does not export ") + name);
  return reinterpret_cast<Function>(found);
}

void PrintFields(IPluginCreatorInterface* const* creators, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
    std::printf("creator %s %s %s\n", creator.getPluginName(), creator.getPluginVersion(), creator.getPluginNamespace());
    const PluginFieldCollection& fields = *creator.getFieldNames();
    for (int32_t k = 0; k < fields.nbFields; ++k)
      std::printf("field %s %s\n", fields.fields[k].name,
                  fields.fields[k].type == PluginFieldType::kINT32     ? "int"
                  : fields.fields[k].type == PluginFieldType::kFLOAT32 ? "float"
                                                                       : "string");
  }
}

int Main(const char* path, const std::string& what) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  Finder finder;
  Symbol<void (*)(ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators =
      Symbol<IPluginCreatorInterface* const* (*)(int32_t&)>(library, "getCreators")(count);
  if (what == "--fields") return PrintFields(creators, count), 0;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(what))
    if (entry.path().extension() == ".case") paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  for (std::filesystem::path& at : paths) {
    const Case one = ReadCase(at);
    finder.log.lines.clear();
    std::vector<Tensor> results;
    std::string status = "ok";
    try {
      results = Run(one, FindCreator(one, creators, count));
    } catch (const Failure& failure) {
      status = std::string(failure.step) + " " + OneLine(failure.what());
    }
    std::ofstream file(at.replace_extension(".result"), std::ios::binary);
    file << "status " << status << "\n";
    for (const std::string& line : finder.log.lines) file << "log " << line << "\n";
    for (const Tensor& result : results) {
      file << "output " << result.name << " " << result.type->name << " " << result.shape.size();
      for (const int64_t size : result.shape) file << " " << size;
      file << "\n";
    }
    file << "end\n";
    for (const Tensor& result : results) file.write(result.data.data(), static_cast<std::streamsize>(result.data.size()));
    if (!file.flush()) throw std::runtime_error(at.string() + " can't be written");
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: plugin_conformance LIBRARY --fields|FOLDER\n"), 2;
  try {
    return Main(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "plugin_conformance: %s\n", error.what()), 1;
  }
}
