# SPDX-License-Identifier: Apache-2.0
# Finds the C++ headers of TensorRT 10.0 or newer, or of TensorRT-RTX (Apache-2.0); no library is linked. Defines
# TensorRT::Headers, TensorRTHeaders_INCLUDE_DIR, TensorRTHeaders_VERSION, and TensorRTHeaders_REASON when they were not found.
#
# In this order: TENSORRT_INCLUDE_DIR, then TENSORRT_ROOT/include (CMake variables or environment), the system's include paths, the
# user's cache of an earlier download, and a download.
set(_trt_header NvInferRuntime.h)
# A folder that an earlier configuration found may be gone by now.
if(TensorRTHeaders_INCLUDE_DIR AND NOT EXISTS "${TensorRTHeaders_INCLUDE_DIR}/${_trt_header}")
  unset(TensorRTHeaders_INCLUDE_DIR CACHE)
endif()
set(TensorRTHeaders_REASON "")
foreach(_trt_name TENSORRT_INCLUDE_DIR TENSORRT_ROOT)
  set(_trt_given "${${_trt_name}}")
  if(NOT _trt_given)
    set(_trt_given "$ENV{${_trt_name}}")
  endif()
  if(_trt_given AND NOT TensorRTHeaders_INCLUDE_DIR)
    find_path(TensorRTHeaders_INCLUDE_DIR ${_trt_header} PATHS "${_trt_given}"
      PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE} NO_DEFAULT_PATH)
    if(NOT TensorRTHeaders_INCLUDE_DIR)
      message(FATAL_ERROR "${_trt_name} is '${_trt_given}', but ${_trt_header} is not there.")
    endif()
  endif()
endforeach()
find_path(TensorRTHeaders_INCLUDE_DIR ${_trt_header} PATHS /usr/local/tensorrt/include /opt/tensorrt/include)

if(NOT TensorRTHeaders_INCLUDE_DIR)
  if(DEFINED ENV{XDG_CACHE_HOME})
    set(_trt_cache "$ENV{XDG_CACHE_HOME}/clada-export/tensorrt-headers")
  elseif(DEFINED ENV{HOME})
    set(_trt_cache "$ENV{HOME}/.cache/clada-export/tensorrt-headers")
  else()
    set(_trt_cache "${CMAKE_BINARY_DIR}/tensorrt-headers")
  endif()
  set(_trt_result 0)
  if(NOT EXISTS "${_trt_cache}/${_trt_header}")
    message(STATUS "TensorRT headers: not on this machine; fetching them into ${_trt_cache}")
    execute_process(
      COMMAND sh "${CMAKE_CURRENT_LIST_DIR}/fetch_trt_headers.sh" "${_trt_cache}"
      RESULT_VARIABLE _trt_result)
  endif()
  if(_trt_result EQUAL 0)
    set(TensorRTHeaders_INCLUDE_DIR "${_trt_cache}" CACHE PATH "Headers of TensorRT" FORCE)
  else()
    set(TensorRTHeaders_REASON "its headers are not on this machine and could not be fetched (set TENSORRT_ROOT)")
  endif()
endif()

# TensorRT writes its version as a number or through a second macro; TensorRT-RTX has names of its own.
if(TensorRTHeaders_INCLUDE_DIR AND EXISTS "${TensorRTHeaders_INCLUDE_DIR}/NvInferVersion.h")
  file(STRINGS "${TensorRTHeaders_INCLUDE_DIR}/NvInferVersion.h" _trt_lines REGEX "^#define (TRT|NV_TENSORRT)_")
  foreach(_trt_part MAJOR MINOR PATCH)
    foreach(_trt_line IN LISTS _trt_lines)
      if(_trt_line MATCHES "^#define (TRT|NV_TENSORRT)_${_trt_part}(_ENTERPRISE|_RTX)? +([0-9]+)")
        list(APPEND _trt_version ${CMAKE_MATCH_3})
        break()
      endif()
    endforeach()
  endforeach()
  string(REPLACE ";" "." TensorRTHeaders_VERSION "${_trt_version}")
  unset(_trt_version)
  # RTX counts from 1; TensorRT itself has version 3 of the plugin interface since 10.0.
  if(TensorRTHeaders_VERSION VERSION_LESS 10 AND TensorRTHeaders_VERSION VERSION_GREATER_EQUAL 2)
    set(TensorRTHeaders_REASON
      "the headers in ${TensorRTHeaders_INCLUDE_DIR} are of TensorRT ${TensorRTHeaders_VERSION}; 10.0 or newer is needed")
    set(TensorRTHeaders_INCLUDE_DIR TensorRTHeaders_INCLUDE_DIR-NOTFOUND)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRTHeaders
  REQUIRED_VARS TensorRTHeaders_INCLUDE_DIR VERSION_VAR TensorRTHeaders_VERSION)
if(TensorRTHeaders_FOUND AND NOT TARGET TensorRT::Headers)
  add_library(TensorRT::Headers INTERFACE IMPORTED)
  # As system headers: their warnings are not ours.
  set_target_properties(TensorRT::Headers PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${TensorRTHeaders_INCLUDE_DIR}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TensorRTHeaders_INCLUDE_DIR}")
endif()
