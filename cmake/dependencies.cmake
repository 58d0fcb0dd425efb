# Libraries of the system, found by pkg-config. A missing one names its Debian package.

find_program(PKG_CONFIG_EXECUTABLE pkg-config)
if(NOT PKG_CONFIG_EXECUTABLE)
    message(FATAL_ERROR "pkg-config is missing: install the Debian package pkg-config")
endif()
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)

add_library(vrep_dependencies INTERFACE)
target_link_libraries(vrep_dependencies INTERFACE Threads::Threads m)

function(vrep_require module package)
    pkg_check_modules(${module} QUIET IMPORTED_TARGET ${module})
    if(NOT ${module}_FOUND)
        message(FATAL_ERROR "The library ${module} is missing: install the Debian package ${package}")
    endif()
    target_link_libraries(vrep_dependencies INTERFACE PkgConfig::${module})
endfunction()

vrep_require(libxxhash libxxhash-dev)
vrep_require(liburing liburing-dev)
vrep_require(libcrypto libssl-dev)
vrep_require(libssl libssl-dev)
vrep_require(libzstd libzstd-dev)
