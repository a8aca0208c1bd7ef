// What a torch without CUDA asks about a GPU: which device is current, whether one is there, what runs on its streams.
// Devices are torch's own fake ones, made for its tests; streams and events do nothing, because a pretended GPU is done
// with an operation when the operation returns.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
using AppleGuard = c10::impl::FakeGuardImpl<c10::DeviceType::MPS>;

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  int getNumGPUs() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  c10::DeviceIndex current_device() const override { return Guard::getDeviceIndex(); }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard::setDeviceIndex(index); }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
C10_REGISTER_GUARD_IMPL(MPS, AppleGuard)

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

extern "C" int current_device() { return Guard::getDeviceIndex(); }

extern "C" void set_current_device(int index) { Guard::setDeviceIndex(static_cast<c10::DeviceIndex>(index)); }
