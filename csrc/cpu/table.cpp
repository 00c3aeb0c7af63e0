#include "table.h"

#define TF_STRING_(s) #s
#define TF_STRING(s) TF_STRING_(s)

namespace tf::TF_ISA {

// The kernels are declared from the C ABI, so a kernel whose parameters differ from it fails to link.
#define TF_DECLARE(kernel) decltype(::tf_##kernel) kernel;
TF_KERNELS(TF_DECLARE)

extern const Table table;
#define TF_ENTRY(kernel) kernel,
const Table table = {TF_STRING(TF_ISA), TF_KERNELS(TF_ENTRY)};

}  // namespace tf::TF_ISA
