# Debian's compiler for ARM64, with the libraries and headers of the folder that tests/aarch64/run has made.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_SYSROOT $ENV{PEFT_KERNELS_SYSROOT})
