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

# AES-GCM at the full width of the processor, where there is one that it is made for: it has no
# pkg-config file. Without it OpenSSL's serves (crypto/gcm.h).
find_path(ipsec_mb_include intel-ipsec-mb.h)
find_library(ipsec_mb_library IPSec_MB)
if(ipsec_mb_include AND ipsec_mb_library)
    target_compile_definitions(vrep_dependencies INTERFACE VREP_IPSEC_MB)
    target_include_directories(vrep_dependencies INTERFACE ${ipsec_mb_include})
    target_link_libraries(vrep_dependencies INTERFACE ${ipsec_mb_library})
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    message(STATUS "AES-GCM is OpenSSL's: the Debian package libipsec-mb-dev makes it faster")
endif()
