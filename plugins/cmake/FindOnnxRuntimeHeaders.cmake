# SPDX-License-Identifier: Apache-2.0
# Finds the C++ headers of ONNX Runtime (MIT); no library is linked. Defines OnnxRuntime::Headers.
#
# In this order: ONNXRUNTIME_INCLUDE_DIR (CMake variable or environment), the system's include paths, the user's cache of an
# earlier download, and a download (Debian's package, then the official release archive).
set(_ort_header onnxruntime_cxx_api.h)
# A folder that an earlier configuration found may be gone by now.
if(OnnxRuntimeHeaders_INCLUDE_DIR AND NOT EXISTS "${OnnxRuntimeHeaders_INCLUDE_DIR}/${_ort_header}")
  unset(OnnxRuntimeHeaders_INCLUDE_DIR CACHE)
endif()
set(_ort_given "${ONNXRUNTIME_INCLUDE_DIR}")
if(NOT _ort_given)
  set(_ort_given "$ENV{ONNXRUNTIME_INCLUDE_DIR}")
endif()

if(_ort_given)
  find_path(OnnxRuntimeHeaders_INCLUDE_DIR ${_ort_header} PATHS "${_ort_given}"
    PATH_SUFFIXES onnxruntime include include/onnxruntime onnxruntime/core/session NO_DEFAULT_PATH)
  if(NOT OnnxRuntimeHeaders_INCLUDE_DIR)
    message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is '${_ort_given}', but ${_ort_header} is not there.")
  endif()
else()
  find_path(OnnxRuntimeHeaders_INCLUDE_DIR ${_ort_header} PATH_SUFFIXES onnxruntime onnxruntime/core/session)
endif()

if(NOT OnnxRuntimeHeaders_INCLUDE_DIR)
  if(DEFINED ENV{XDG_CACHE_HOME})
    set(_ort_cache "$ENV{XDG_CACHE_HOME}/clada-export/onnxruntime-headers")
  elseif(DEFINED ENV{HOME})
    set(_ort_cache "$ENV{HOME}/.cache/clada-export/onnxruntime-headers")
  else()
    set(_ort_cache "${CMAKE_BINARY_DIR}/onnxruntime-headers")
  endif()
  if(NOT EXISTS "${_ort_cache}/${_ort_header}")
    message(STATUS "ONNX Runtime headers: not on this machine; fetching them into ${_ort_cache}")
    execute_process(
      COMMAND sh "${CMAKE_CURRENT_LIST_DIR}/fetch_ort_headers.sh" "${_ort_cache}"
      RESULT_VARIABLE _ort_result)
    if(NOT _ort_result EQUAL 0)
      message(FATAL_ERROR
        "The headers of ONNX Runtime could not be fetched (see above). Do one of these:\n"
        "  - install them: apt-get install libonnxruntime-dev (Debian 13 or newer, Ubuntu 25.04 or newer), or\n"
        "  - unpack onnxruntime-linux-x64-1.20.1.tgz (or newer) from https://github.com/microsoft/onnxruntime/releases\n"
        "    and set the environment variable ONNXRUNTIME_INCLUDE_DIR to its folder 'include'.")
    endif()
  endif()
  set(OnnxRuntimeHeaders_INCLUDE_DIR "${_ort_cache}" CACHE PATH "Headers of ONNX Runtime" FORCE)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntimeHeaders REQUIRED_VARS OnnxRuntimeHeaders_INCLUDE_DIR)
if(OnnxRuntimeHeaders_FOUND AND NOT TARGET OnnxRuntime::Headers)
  add_library(OnnxRuntime::Headers INTERFACE IMPORTED)
  # As system headers: their warnings are not ours.
  set_target_properties(OnnxRuntime::Headers PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${OnnxRuntimeHeaders_INCLUDE_DIR}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${OnnxRuntimeHeaders_INCLUDE_DIR}")
endif()
