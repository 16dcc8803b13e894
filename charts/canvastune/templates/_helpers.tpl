{{/* The names of the objects: RELEASE-canvastune, or only RELEASE if it contains the chart's name. A service's name has no dot. */}}
{{- define "canvastune.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $release := replace "." "-" .Release.Name -}}
{{- default (contains $name $release | ternary $release (printf "%s-%s" $release $name)) .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "canvastune.mlflow.fullname" -}}{{ include "canvastune.fullname" . }}-mlflow{{- end -}}

{{/* The labels of a selector, which must never change: (dict "root" . "component" "mlflow"). */}}
{{- define "canvastune.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "canvastune.labels" -}}
{{ include "canvastune.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: canvastune
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The reference of an image: (dict "root" . "image" .Values.images.mlflow). A digest overrides the tag. */}}
{{- define "canvastune.image" -}}
{{- $registry := default .root.Values.images.registry .image.registry -}}
{{- if $registry }}{{ trimSuffix "/" $registry }}/{{ end }}{{ .image.repository -}}
{{- if .image.digest -}}@{{ .image.digest }}{{- else -}}:{{ default .root.Chart.AppVersion .image.tag }}{{- end -}}
{{- end -}}

{{/* Names of pull secrets, each given as a name or as {name: ...}: those of all images and of one section. JSON. */}}
{{- define "canvastune.pullSecretNames" -}}
{{- $names := list -}}
{{- range concat (default list .root.Values.images.pullSecrets) (default list .own) -}}
{{- $names = append $names (kindIs "string" . | ternary . (get (kindIs "map" . | ternary . dict) "name")) -}}
{{- end -}}
{{- $names | uniq | toJson -}}
{{- end -}}

{{- define "canvastune.pullSecrets" -}}
{{- with include "canvastune.pullSecretNames" (dict "root" .) | fromJsonArray -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Annotations of an object: (dict "root" . "own" (dict ...)). Own ones win. */}}
{{- define "canvastune.annotations" -}}
{{- with merge (dict) (default dict .own) (default dict .root.Values.commonAnnotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Variables of a container: (dict "env" ... "secretEnv" ...); a value is text or {valueFrom: ...}. */}}
{{- define "canvastune.env" -}}
{{- range $key, $value := .env }}
- name: {{ $key }}
  {{- if kindIs "map" $value }}
  {{- toYaml $value | nindent 2 }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- range $key, $source := .secretEnv }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $source.secret }}
      key: {{ $source.key }}
{{- end }}
{{- end -}}

{{/* Where the pods of a section run: (.Values.steps, for example). */}}
{{- define "canvastune.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The bundle of certificates of `steps`, for the chart's own jobs: variables, mount and volume. */}}
{{- define "canvastune.steps.env" -}}
{{- $steps := .Values.steps }}
{{- include "canvastune.env" (dict "env" $steps.env "secretEnv" $steps.secretEnv) }}
{{- if or $steps.caBundle.configMap $steps.caBundle.secret }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "CURL_CA_BUNDLE" "AWS_CA_BUNDLE" "GIT_SSL_CAINFO" "MLFLOW_TRACKING_SERVER_CERT_PATH" }}
- name: {{ . }}
  value: {{ printf "/etc/canvastune-ca/%s" $steps.caBundle.key }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "canvastune.steps.caMount" -}}
{{- with .Values.steps.caBundle }}
{{- if or .configMap .secret }}
- name: ca-bundle
  mountPath: /etc/canvastune-ca
  readOnly: true
{{- end }}
{{- end }}
{{- end -}}

{{- define "canvastune.steps.caVolume" -}}
{{- with .Values.steps.caBundle }}
{{- if .configMap }}
- name: ca-bundle
  configMap:
    name: {{ .configMap }}
{{- else if .secret }}
- name: ca-bundle
  secret:
    secretName: {{ .secret }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Settings that `steps` and `training` share, with the names of a recipe: (dict "root" . "section" .Values.steps). JSON.
A priority class is set by the caller: Kubeflow Pipelines has none for steps. */}}
{{- define "canvastune.podSettings" -}}
{{- $ca := .section.caBundle -}}
{{- $bundle := dict "config_map" (default nil $ca.configMap) "secret" (default nil $ca.secret) "key" $ca.key -}}
{{- dict
  "env" (default dict .section.env)
  "secret_env" (default dict .section.secretEnv)
  "pull_secrets" (include "canvastune.pullSecretNames" (dict "root" .root "own" .section.pullSecrets) | fromJsonArray)
  "resources" (dict "requests" (default dict (default dict .section.resources).requests) "limits" (default dict (default dict .section.resources).limits))
  "node_selector" (default dict .section.nodeSelector)
  "tolerations" (default list .section.tolerations)
  "affinity" (default dict .section.affinity)
  "priority_class" (default nil .priorityClass)
  "extra_volumes" (default list .section.extraVolumes)
  "extra_volume_mounts" (default list .section.extraVolumeMounts)
  "ca_bundle" (or $ca.configMap $ca.secret | empty | ternary nil $bundle)
  | toJson -}}
{{- end -}}

{{/* PodSecurity restricted, for a pod and for a container. */}}
{{- define "canvastune.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- include "canvastune.volumeGroup" . }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "canvastune.volumeGroup" -}}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end -}}

{{- define "canvastune.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* "true" if the chart installs MLflow. */}}
{{- define "canvastune.mlflow.installed" -}}
{{- if not .Values.mlflow.existingUri -}}true{{- end -}}
{{- end -}}

{{/* The volume of /tmp of the chart's own pods. */}}
{{- define "canvastune.tmp" -}}
{{- with .Values.tmpSizeLimit }}{sizeLimit: {{ . }}}{{ else }}{}{{ end -}}
{{- end -}}

{{/* "true" if MLflow stores anything in files. */}}
{{- define "canvastune.mlflow.usesSqlite" -}}
{{- if not (include "canvastune.mlflow.installed" .) -}}
{{- else if or (not .Values.mlflow.database.existingSecret.name) (and .Values.mlflow.auth.enabled (not .Values.mlflow.auth.database.existingSecret.name)) -}}true{{- end -}}
{{- end -}}

{{- define "canvastune.mlflow.usesVolume" -}}
{{- if not (include "canvastune.mlflow.installed" .) -}}
{{- else if or (include "canvastune.mlflow.usesSqlite" .) (not .Values.mlflow.artifacts.destination) -}}true{{- end -}}
{{- end -}}

{{- define "canvastune.mlflow.claim" -}}
{{- default (include "canvastune.mlflow.fullname" .) .Values.mlflow.persistence.existingClaim -}}
{{- end -}}

{{- define "canvastune.workspace.claim" -}}
{{- default (printf "%s-workspace" (include "canvastune.fullname" .)) .Values.workspace.existingClaim -}}
{{- end -}}

{{/* The claims whose use is watched, as a regular expression. */}}
{{- define "canvastune.claims" -}}
{{- $claims := list (include "canvastune.workspace.claim" .) -}}
{{- if include "canvastune.mlflow.usesVolume" . -}}
{{- $claims = append $claims (include "canvastune.mlflow.claim" .) -}}
{{- end -}}
{{- $claims | uniq | join "|" -}}
{{- end -}}

{{- define "canvastune.mlflow.serviceAccount" -}}
{{- default (include "canvastune.mlflow.fullname" .) .Values.mlflow.serviceAccount.name -}}
{{- end -}}

{{- define "canvastune.training.serviceAccount" -}}
{{- default (printf "%s-training" (include "canvastune.fullname" .)) .Values.training.serviceAccount -}}
{{- end -}}

{{- define "canvastune.upload.serviceAccount" -}}
{{- default (printf "%s-upload" (include "canvastune.fullname" .)) .Values.pipeline.upload.serviceAccount -}}
{{- end -}}

{{- define "canvastune.training.runtime" -}}
{{- default (include "canvastune.fullname" .) .Values.training.runtime -}}
{{- end -}}

{{- define "canvastune.serving.fullname" -}}{{ include "canvastune.fullname" . }}-serving{{- end -}}

{{/* Every host name by which pods can call MLflow, shortest first, as JSON. */}}
{{- define "canvastune.mlflow.serviceNames" -}}
{{- $name := include "canvastune.mlflow.fullname" . -}}
{{- $inNamespace := printf "%s.%s" $name .Release.Namespace -}}
{{- list $name $inNamespace (printf "%s.svc" $inNamespace) (printf "%s.svc.%s" $inNamespace .Values.clusterDomain) | toJson -}}
{{- end -}}

{{/* --allowed-hosts replaces MLflow's default list, so it lists everything: services, port-forward, ingress, and the
pod's own address, of either family, which probes and Prometheus call. */}}
{{- define "canvastune.mlflow.allowedHosts" -}}
{{- $hosts := list "localhost" "localhost:*" "127.0.0.1" "127.0.0.1:*" "$(POD_IP):5000" "[$(POD_IP)]:5000" -}}
{{- range include "canvastune.mlflow.serviceNames" . | fromJsonArray -}}
{{- $hosts = concat $hosts (list . (printf "%s:%d" . (int $.Values.mlflow.service.port))) -}}
{{- end -}}
{{- range include "canvastune.mlflow.outerNames" . | fromJsonArray -}}
{{- $hosts = concat $hosts (list . (printf "%s:*" .)) -}}
{{- end -}}
{{- concat $hosts (default list .Values.mlflow.extraAllowedHosts) | uniq | join "," -}}
{{- end -}}

{{/* The origins from which MLflow's own pages are loaded: their calls carry that origin. */}}
{{- define "canvastune.mlflow.allowedOrigins" -}}
{{- $origins := list -}}
{{- range include "canvastune.mlflow.serviceNames" . | fromJsonArray -}}
{{- $origins = concat $origins (list (printf "http://%s" .) (printf "http://%s:%d" . (int $.Values.mlflow.service.port))) -}}
{{- end -}}
{{- range include "canvastune.mlflow.outerNames" . | fromJsonArray -}}
{{- $origins = concat $origins (list (printf "https://%s" .) (printf "http://%s" .)) -}}
{{- end -}}
{{- concat $origins (default list .Values.mlflow.extraAllowedOrigins) | uniq | join "," -}}
{{- end -}}

{{/* The ingress' hosts, each given as a name or as {host: ..., paths: [...]}. JSON. */}}
{{- define "canvastune.ingress.hosts" -}}
{{- $names := list -}}
{{- $prefix := default "/" .Values.mlflow.pathPrefix -}}
{{- range .Values.ingress.hosts -}}
{{- if kindIs "string" . -}}
{{- $names = append $names . -}}
{{- else -}}
{{- $names = append $names .host -}}
{{- range .paths -}}
{{- $path := default "/" (trimSuffix "/" (kindIs "string" . | ternary . (get (kindIs "map" . | ternary . dict) "path"))) -}}
{{- if ne $path $prefix -}}
{{- fail (printf "ingress.hosts: found path %s, expected %s: MLflow serves below one path, which mlflow.pathPrefix sets (mlflow.pathPrefix: %s)" $path $prefix $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names | toJson -}}
{{- end -}}

{{/* Host names outside of the cluster, by ingress and by HTTPRoute. JSON. */}}
{{- define "canvastune.mlflow.outerNames" -}}
{{- $names := list -}}
{{- if .Values.ingress.enabled -}}
{{- $names = concat $names (include "canvastune.ingress.hosts" . | fromJsonArray) -}}
{{- end -}}
{{- if .Values.httpRoute.enabled -}}
{{- $names = concat $names (default list .Values.httpRoute.hostnames) -}}
{{- end -}}
{{- $names | uniq | toJson -}}
{{- end -}}

{{- define "canvastune.mlflow.url" -}}
{{- with .Values.mlflow.existingUri -}}{{ . }}{{- else -}}
http://{{ include "canvastune.mlflow.fullname" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.mlflow.service.port }}{{ .Values.mlflow.pathPrefix }}
{{- end -}}
{{- end -}}

{{/* The run config's section `cluster`, as JSON. A TrainJob has no place for scheduler and pod priority: its runtime has
them. The pipeline's steps mount the workspace at /workspace, and so do the training pods. */}}
{{- define "canvastune.cluster" -}}
{{- $training := .Values.training -}}
{{- $inRuntime := eq $training.backend "trainjob" -}}
{{- $env := merge (dict) (default dict $training.env) (dict "MLFLOW_TRACKING_URI" (include "canvastune.mlflow.url" .)) -}}
{{- $settings := include "canvastune.podSettings" (dict "root" . "section" $training) | fromJson -}}
{{- $limits := $settings.resources.limits -}}
{{- if and $training.cpuLimit (not (hasKey $limits "cpu")) -}}
{{- $limits = merge (dict "cpu" (default $training.cpu (get $settings.resources.requests "cpu"))) $limits -}}
{{- end -}}
{{- $own := dict
  "backend" $training.backend
  "nodes" (int $training.nodes)
  "image" (include "canvastune.image" (dict "root" . "image" .Values.images.trainer))
  "claim" (include "canvastune.workspace.claim" .)
  "mount_path" "/workspace"
  "sub_path" (default nil .Values.workspace.subPath)
  "gpu_resource" (default nil $training.gpuResource)
  "cpu" $training.cpu
  "memory" $training.memory
  "shm" $training.shm
  "env" $env
  "credentials" (default nil .Values.credentials.existingSecret)
  "fs_group" .Values.podSecurity.fsGroup
  "queue" (default nil $training.queue)
  "priority_class" (and $inRuntime (not $training.queue) | ternary nil (default nil $training.priorityClassName))
  "scheduler" ($inRuntime | ternary nil (default nil $training.scheduler))
  "service_account" (include "canvastune.training.serviceAccount" .)
  "rdma_resource" (default nil $training.rdmaResource)
  "rdma_count" (int $training.rdmaCount)
  "deadline_hours" $training.deadlineHours
  "queue_hours" $training.queueHours
  "restarts" (int $training.restarts)
  "ttl_hours" $training.ttlHours
  "runtime" (include "canvastune.training.runtime" .)
  "gpu_hour_price" $training.gpuHourPrice
  "currency" $training.currency
  "resources" (dict "requests" $settings.resources.requests "limits" $limits)
  "ca_bundle" (get $settings "ca_bundle")
-}}
{{- merge $own $settings | toPrettyJson -}}
{{- end -}}
