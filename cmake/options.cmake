# Build options, and the two interface targets through which they act:
# vrep_options for every object, vrep_warnings for C that people wrote.

option(VREP_PYTHON "Build the Python extension modules" OFF)
option(VREP_TESTS "Build the native tests" OFF)
option(VREP_FUZZ "Build the fuzz targets (needs clang)" OFF)
option(VREP_WERROR "Warn about everything, and stop at a warning" OFF)
set(VREP_SANITIZE "" CACHE STRING "Sanitizer: empty, address (with undefined) or thread")

if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

add_library(vrep_options INTERFACE)
target_compile_definitions(vrep_options INTERFACE _GNU_SOURCE)

if(VREP_SANITIZE STREQUAL "address")
    set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(VREP_SANITIZE STREQUAL "thread")
    set(sanitize -fsanitize=thread)
elseif(NOT VREP_SANITIZE STREQUAL "")
    message(FATAL_ERROR "VREP_SANITIZE is '${VREP_SANITIZE}': use address or thread")
endif()
if(sanitize)
    target_compile_options(vrep_options INTERFACE ${sanitize} -fno-omit-frame-pointer)
    target_link_options(vrep_options INTERFACE ${sanitize})
endif()
if(VREP_FUZZ)
    if(NOT CMAKE_C_COMPILER_ID STREQUAL "Clang")
        message(FATAL_ERROR "VREP_FUZZ needs clang (Debian packages: clang, libclang-rt-14-dev)")
    endif()
    target_compile_options(vrep_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# OpenSSL's macros put __FILE__ into what calls them: no file of a package names where it was built.
add_compile_options(-fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=)

add_library(vrep_warnings INTERFACE)
if(VREP_WERROR)
    target_compile_options(vrep_warnings INTERFACE -Wall -Wextra -Wconversion -Werror)
    if(VREP_SANITIZE STREQUAL "thread" AND CMAKE_C_COMPILER_ID STREQUAL "GNU")
        # TSan does not see stand-alone fences: that can add reports, never hide one.
        target_compile_options(vrep_warnings INTERFACE -Wno-tsan)
    endif()
endif()
