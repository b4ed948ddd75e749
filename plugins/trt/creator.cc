// SPDX-License-Identifier: Apache-2.0
#include "creator.h"

#include "log.h"

namespace clada::trt {
namespace {

// TensorRT has chosen this creator by these two already; a caller of createPlugin may still pass others on.
void WantText(const std::string& node, const FieldReader& reader, const char* field, const char* wanted) {
  std::string found = wanted;
  reader.String(field, &found);
  if (found != wanted)
    throw ContractError("SparseFFN node '" + node + "': attribute '" + field + "' is '" + found + "'; this is '" + wanted + "'");
}

}  // namespace

SparseFFNCreator::SparseFFNCreator() {
  WriteAttributes(Attributes(), fields_);
  fields_.DropValues();
}

nvinfer1::IPluginV3* SparseFFNCreator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                                    nvinfer1::TensorRTPhase phase) noexcept {
  try {
    std::string node = name ? name : "";
    const FieldReader reader(node, fields);
    std::vector<std::string> known = fields_.Names();
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
      reader.String(kNodeField, &node);
      std::string version = CLADA_VERSION;
      reader.String(kVersionField, &version);
      if (version != CLADA_VERSION)
        throw ContractError("SparseFFN node '" + node + "': the engine was built with the plugin of clada " + version +
                            "; this library is of clada " + CLADA_VERSION + ": load the engine's own, or build it again");
      known.insert(known.end(), {kNodeField, kVersionField});
    } else {
      WantText(node, reader, "plugin_version", kOpVersionText);
      WantText(node, reader, "plugin_namespace", kDomain);
      known.insert(known.end(), {"plugin_version", "plugin_namespace"});
    }
    reader.RefuseOthers(known);
    const Attributes attributes = ReadAttributes(node, reader);
    WantPlainWeights(node, attributes);
    return new SparseFFNPlugin(node, attributes);
  } catch (const std::exception& error) {
    LogError(error.what());
  } catch (...) {
    LogError("SparseFFN: an unknown exception");
  }
  return nullptr;
}

}  // namespace clada::trt
