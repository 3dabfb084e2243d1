# Sourced: the environment that verl, Ray and vLLM need on a machine without a GPU.
export VERL_PLATFORM=cpu
# nobind: vLLM's own pinning leaves one core to everything else.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND=nobind
# vLLM keeps its worker in the engine's process (config: "uni") only where V1 multiprocessing is off.
export VLLM_ENABLE_V1_MULTIPROCESSING=0
# Ray sets OMP_NUM_THREADS=1 where it is not set, and gives its workers a niceness that anything else on the machine beats.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" RAY_worker_niceness=0
# glibc gives large blocks back to the system at once: each training step then takes its memory anew, page by page (39,000 page
# faults, a sixth of its time). Blocks up to 1 GiB are kept for the next step.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
export TOKENIZERS_PARALLELISM=false
