# An example: qkilld-stop stops the guests of microvm.nix, whose units microvm@NAME.service run one QEMU
# each. It asks the guest to shut down, then sends SIGTERM and waits as long as QEMU makes progress.
{ config, ... }:

{
  imports = [ ./module.nix ];

  services.qkilld = {
    enable = true;
    stopGuestsAtShutdown = true;
    settings.Policy = {
      GraceSec = "30s";
      Powerdown = true;
    };
  };

  systemd.services."microvm@" = {
    serviceConfig = {
      ExecStop = [ "+-${config.services.qkilld.package}/bin/qkilld-stop" ];
      NotifyAccess = "exec";
      TimeoutStopSec = "90s";
    };
  };
}
