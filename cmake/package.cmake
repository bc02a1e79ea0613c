# libbnb.so, and what `cmake --install` gives: headers, both libraries, the files that find_package and pkg-config read. All of it is the
# component "bnb"; the component "python" is the wheel's.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

add_library(bnb_shared SHARED $<TARGET_OBJECTS:bnb>)
add_library(bitsandbytes::bnb_shared ALIAS bnb_shared)
target_compile_features(bnb_shared PUBLIC cxx_std_20)
target_include_directories(bnb_shared PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
target_link_libraries(bnb_shared PRIVATE Threads::Threads)
set_target_properties(bnb_shared PROPERTIES OUTPUT_NAME bnb LINKER_LANGUAGE CXX VERSION ${PROJECT_VERSION}
                                            SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_link_options(bnb_shared PRIVATE LINKER:--version-script=${CMAKE_CURRENT_LIST_DIR}/exports.map)
  set_property(TARGET bnb_shared PROPERTY LINK_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/exports.map)
endif()
if(NOT BNB_INSTALL)
  set_property(TARGET bnb_shared PROPERTY EXCLUDE_FROM_ALL ON)
  return()
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/bitsandbytes)
install(TARGETS bnb bnb_shared EXPORT bitsandbytes COMPONENT bnb INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        LIBRARY COMPONENT bnb NAMELINK_COMPONENT bnb)
install(DIRECTORY include/bnb DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT bnb)
install(EXPORT bitsandbytes NAMESPACE bitsandbytes:: FILE bitsandbytesTargets.cmake DESTINATION ${package_dir} COMPONENT bnb)
configure_package_config_file(cmake/bitsandbytesConfig.cmake.in bitsandbytesConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(bitsandbytesConfigVersion.cmake COMPATIBILITY SameMinorVersion)
file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/bnb.pc.in bnb.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/bitsandbytesConfig.cmake ${PROJECT_BINARY_DIR}/bitsandbytesConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT bnb)
install(FILES ${PROJECT_BINARY_DIR}/bnb.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT bnb)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATAROOTDIR}/doc/libbnb-dev RENAME copyright COMPONENT bnb)

if(PROJECT_IS_TOP_LEVEL)  # `cpack` in the build folder makes libbnb-dev_<version>_<architecture>.deb
  set(CPACK_GENERATOR DEB)
  set(CPACK_INSTALL_CMAKE_PROJECTS "${PROJECT_BINARY_DIR};${PROJECT_NAME};bnb;/")
  set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
  set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "k-bit quantization: 4-bit NF4 and FP4, LLM.int8(), 8-bit optimizers (C++ and C library)")
  set(CPACK_DEBIAN_PACKAGE_NAME libbnb-dev)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_MAINTAINER "The bitsandbytes C++ authors <noreply@localhost>")
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
  include(CPack)
endif()
