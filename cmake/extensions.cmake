# Every src/vrep/_core/<stem>.pyx becomes the extension module vrep._core.<stem>.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module NumPy)

file(GLOB core_modules CONFIGURE_DEPENDS src/vrep/_core/*.pyx)
foreach(source IN LISTS core_modules)
    cmake_path(GET source STEM stem)
    set(generated ${CMAKE_CURRENT_BINARY_DIR}/cython/${stem}.c)
    add_custom_command(
        OUTPUT ${generated}
        COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cython
        COMMAND ${Python_EXECUTABLE} -m cython -3 -M
                -I ${CMAKE_CURRENT_SOURCE_DIR}/src
                --module-name vrep._core.${stem} -o ${generated} ${source}
        DEPENDS ${source}
        DEPFILE ${generated}.dep
        COMMENT "Cython vrep._core.${stem}"
        VERBATIM)
    python_add_library(core_${stem} MODULE WITH_SOABI ${generated})
    set_target_properties(core_${stem} PROPERTIES OUTPUT_NAME ${stem} INSTALL_RPATH "$ORIGIN")
    target_compile_definitions(core_${stem} PRIVATE NPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION)
    target_link_libraries(core_${stem} PRIVATE vrep_native Python::NumPy)
    install(TARGETS core_${stem} LIBRARY DESTINATION vrep/_core)
endforeach()
